from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-layer OLMoE with 64 experts, top-8."""
    import models

    return models.olmoe(tmp_path_factory.mktemp("tiny-olmoe"))
