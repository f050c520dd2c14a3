"""What actors of Ray are told, by stand-ins for vLLM's classes; with a real Ray: test_vllm_ray.py."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moe_monitor.capture.vllm import actors
from moe_monitor.capture.vllm.plugin import ACTORS_VARIABLE, SERVER_VARIABLE


class Vllm:
    """Fresh stand-ins, patched."""

    def __init__(self) -> None:
        class RayDistributedExecutor:
            def _init_workers_ray(self, group: int, then: Callable[[], None] = lambda: None) -> dict[str, str]:
                then()
                if group < 0:
                    raise ValueError(group)
                return dict(os.environ)

        class CoreEngineActorManager:
            def __init__(self, config: str) -> None:
                self.environment = dict(os.environ)

        class RayExecutorV2:
            user: dict[str, Any] = {}  # noqa: RUF012

            def _build_runtime_env(self) -> dict[str, Any]:
                return copy.deepcopy(self.user)

        self.first, self.manager, self.second = RayDistributedExecutor, CoreEngineActorManager, RayExecutorV2
        for _ in range(2):
            actors.patch_first(SimpleNamespace(RayDistributedExecutor=self.first))  # type: ignore[arg-type]
            actors.patch_manager(SimpleNamespace(CoreEngineActorManager=self.manager))  # type: ignore[arg-type]
            actors.patch_second(SimpleNamespace(RayExecutorV2=self.second))  # type: ignore[arg-type]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Vllm:
    for name in [name for name in os.environ if "MOE_MONITOR_" in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(SERVER_VARIABLE, "server-1")
    monkeypatch.setenv("MOE_MONITOR_SAMPLE_RATIO", "0.5")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # as long as vLLM has not set up its own
    return Vllm()


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments that a daemon was started with."""
    started: list[dict[str, str]] = []
    module: Any = ModuleType("ray")
    module.is_initialized = lambda: bool(started)
    module.init = lambda: started.append(dict(os.environ))
    monkeypatch.setitem(sys.modules, "ray", module)
    return started


def ours(environment: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in environment.items() if "MOE_MONITOR_" in k and k != SERVER_VARIABLE}


TOLD = {ACTORS_VARIABLE: "server-1", "MOE_MONITOR_SAMPLE_RATIO": "0.5"}


def test_names_are_added_to_vllms_own() -> None:
    module = SimpleNamespace(DEFAULT_ENV_VAR_PREFIXES={"VLLM_"})
    actors.patch_names(module)  # type: ignore[arg-type]
    assert sorted(module.DEFAULT_ENV_VAR_PREFIXES) == ["MOE_MONITOR_", "VLLM_", ACTORS_VARIABLE]


def test_the_environment_has_it_while_actors_are_started(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    assert ours(vllm.first()._init_workers_ray(1)) == TOLD
    assert ours(vllm.manager("x").environment) == TOLD
    with pytest.raises(ValueError, match="-1"):
        vllm.first()._init_workers_ray(-1)
    assert dict(os.environ) == before
    with pytest.raises(ValueError, match="-2"):
        vllm.first()._init_workers_ray(-2, then=lambda: monkeypatch.delenv(SERVER_VARIABLE))
    assert dict(os.environ) == {k: v for k, v in before.items() if k != SERVER_VARIABLE}


def test_a_daemon_that_is_started_on_the_way_does_not_get_it(vllm: Vllm, ray: list[dict[str, str]]) -> None:
    for _ in range(2):
        vllm.manager("x")
    (environment,) = ray
    assert ACTORS_VARIABLE not in environment


def test_their_own_environment_has_it_and_what_the_user_says_comes_first(vllm: Vllm) -> None:
    assert vllm.second()._build_runtime_env() == {"env_vars": TOLD}
    vllm.second.user = {"pip": ["x"], "env_vars": {"MOE_MONITOR_SAMPLE_RATIO": "1", "MINE": "2"}}
    told = vllm.second()._build_runtime_env()
    assert told == {"pip": ["x"], "env_vars": TOLD | {"MOE_MONITOR_SAMPLE_RATIO": "1", "MINE": "2"}}
    vllm.second.user = {"env_vars": {ACTORS_VARIABLE: "of-an-actor-that-has-started-this"}}
    assert vllm.second()._build_runtime_env()["env_vars"] == TOLD


def test_actors_are_started_whatever_fails_here(
    vllm: Vllm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(SERVER_VARIABLE)
    assert ACTORS_VARIABLE not in vllm.first()._init_workers_ray(1)
    assert ACTORS_VARIABLE not in vllm.manager("x").environment
    vllm.second()._build_runtime_env()
    assert caplog.text.count("Ray's actors do not know their server") == 3
