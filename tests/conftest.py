from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests are skipped where there is none; Triton's interpreter stands in for one in the tests of kernels."""
    if not any(item.get_closest_marker("gpu") for item in items) or os.environ.get("TRITON_INTERPRET") == "1":
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 4-layer OLMoE with 64 experts, top-8."""
    import models

    return models.olmoe(tmp_path_factory.mktemp("tiny-olmoe"))
