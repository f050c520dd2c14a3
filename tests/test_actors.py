"""What actors of Ray are told, by stand-ins for vLLM's classes; with a real Ray: test_vllm_ray.py."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_monitor.capture.vllm import actors
from moe_monitor.capture.vllm.plugin import ACTORS_VARIABLE, SERVER_VARIABLE


class Vllm:
    """Fresh stand-ins, patched."""

    def __init__(self) -> None:
        class RayDistributedExecutor:
            def _init_workers_ray(self, group: int, **more: Any) -> dict[str, str]:
                if group < 0:
                    raise ValueError(group)
                return dict(os.environ)

        class CoreEngineActorManager:
            def __init__(self, config: str) -> None:
                self.environment = dict(os.environ)

        class RayExecutorV2:
            user: dict[str, Any] = {}  # noqa: RUF012

            def _build_runtime_env(self) -> dict[str, Any]:
                return {**self.user}

        self.first, self.manager, self.second = RayDistributedExecutor, CoreEngineActorManager, RayExecutorV2
        for _ in range(2):
            actors.patch_first(SimpleNamespace(RayDistributedExecutor=self.first))  # type: ignore[arg-type]
            actors.patch_manager(SimpleNamespace(CoreEngineActorManager=self.manager))  # type: ignore[arg-type]
            actors.patch_second(SimpleNamespace(RayExecutorV2=self.second))  # type: ignore[arg-type]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Vllm:
    monkeypatch.setenv(SERVER_VARIABLE, "server-1")
    monkeypatch.setenv("MOE_MONITOR_SAMPLE_RATIO", "0.5")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("MOE_MONITOR_DIR", raising=False)
    monkeypatch.delenv(ACTORS_VARIABLE, raising=False)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # as long as vLLM has not set up its own
    return Vllm()


def ours(environment: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if "MOE_MONITOR_" in k and k != SERVER_VARIABLE}


def expected(tmp_path: Path) -> dict[str, str]:
    told = {ACTORS_VARIABLE: "server-1", "MOE_MONITOR_SAMPLE_RATIO": "0.5"}
    return told | {"MOE_MONITOR_DIR": str(tmp_path / "moe-monitor")}


def test_names_are_added_to_vllms_own() -> None:
    module = SimpleNamespace(DEFAULT_ENV_VAR_PREFIXES={"VLLM_"})
    actors.patch_names(module)  # type: ignore[arg-type]
    assert sorted(module.DEFAULT_ENV_VAR_PREFIXES) == ["MOE_MONITOR_", "VLLM_", ACTORS_VARIABLE]


def test_the_environment_has_it_while_actors_are_started(vllm: Vllm, tmp_path: Path) -> None:
    before = dict(os.environ)
    assert ours(vllm.first()._init_workers_ray(1)) == expected(tmp_path)
    assert ours(vllm.manager("x").environment) == expected(tmp_path)
    with pytest.raises(ValueError, match="-1"):
        vllm.first()._init_workers_ray(-1)
    assert dict(os.environ) == before


def test_their_own_environment_has_it_and_what_the_user_says_comes_first(vllm: Vllm, tmp_path: Path) -> None:
    assert vllm.second()._build_runtime_env() == {"env_vars": expected(tmp_path)}
    vllm.second.user = {"pip": ["x"], "env_vars": {"MOE_MONITOR_SAMPLE_RATIO": "1", "MINE": "2"}}
    told = vllm.second()._build_runtime_env()
    assert told["pip"] == ["x"]
    assert told["env_vars"] == expected(tmp_path) | {"MOE_MONITOR_SAMPLE_RATIO": "1", "MINE": "2"}


def test_bad_settings_are_told_as_they_are(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_MONITOR_SAMPLE_RATIO", "much")
    told = vllm.second()._build_runtime_env()["env_vars"]
    assert told == {ACTORS_VARIABLE: "server-1", "MOE_MONITOR_SAMPLE_RATIO": "much"}


def test_actors_are_started_whatever_fails_here(
    vllm: Vllm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(SERVER_VARIABLE)
    assert ACTORS_VARIABLE not in vllm.first()._init_workers_ray(1)
    assert ACTORS_VARIABLE not in vllm.manager("x").environment
    vllm.second()._build_runtime_env()
    assert caplog.text.count("Ray's actors do not know their server") == 3
