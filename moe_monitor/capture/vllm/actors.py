"""Seam: actors of Ray (``vllm.ray.ray_env``, both Ray executors, the manager of data-parallel engines under Ray).

An actor has the environment of Ray's daemon, and what vLLM passes on of its own. The daemon may have been started by
another server of ours. So which server an actor belongs to is told in a variable that exists only while actors are
being started, and that only actors look at (``plugin.py``).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from moe_monitor import settings
from moe_monitor.capture.vllm.plugin import ACTORS_VARIABLE, SERVER_VARIABLE

logger = logging.getLogger("vllm.moe_monitor")

_SENTINEL = "_moe_monitor"


def patch_names(module: ModuleType) -> None:
    """Hook for ``vllm.ray.ray_env``: variables of ours are passed on, too. Not by the variable that vLLM has for that,
    which is part of the key of its compile cache.
    """
    module.DEFAULT_ENV_VAR_PREFIXES.update((settings.PREFIX, ACTORS_VARIABLE))


def patch_first(module: ModuleType) -> None:
    """Hook for ``vllm.v1.executor.ray_executor``: its workers get the variables named in ``vllm.ray.ray_env``."""
    _while_told(module.RayDistributedExecutor, "_init_workers_ray")


def patch_manager(module: ModuleType) -> None:
    """``vllm.v1.engine.utils``: data-parallel engines that are actors get them as well."""
    _while_told(module.CoreEngineActorManager, "__init__")


def patch_second(module: ModuleType) -> None:
    """Hook for ``vllm.v1.executor.ray_executor_v2``: its workers get only what the daemon has not. So ours go into the
    environment that their processes start with.
    """
    cls = module.RayExecutorV2
    original: Callable[..., dict[str, Any]] = cls._build_runtime_env
    if hasattr(original, _SENTINEL):
        return

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made = original(self, *args, **kwargs)
        try:
            variables = made.setdefault("env_vars", {})
            for name, value in _told().items():
                variables.setdefault(name, value)  # what the user has said for actors comes first
        except Exception as error:
            logger.warning("moe-monitor: Ray's actors do not know their server: %r", error)
        return made

    setattr(build, _SENTINEL, original)
    cls._build_runtime_env = build


def _told() -> dict[str, str]:
    """Settings, the directory in full, since its default depends on where one is, and the server."""
    told = {name: value for name, value in os.environ.items() if name.startswith(settings.PREFIX)}
    with contextlib.suppress(settings.SettingsError):  # the worker says so
        told[f"{settings.PREFIX}DIR"] = str(settings.load().dir)
    return told | {ACTORS_VARIABLE: os.environ[SERVER_VARIABLE]}


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(_told())
    try:
        yield
    finally:
        for name in _told():
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


def _while_told(cls: Any, method: str) -> None:
    original = getattr(cls, method)
    if hasattr(original, _SENTINEL):
        return

    @functools.wraps(original)
    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_telling())
            except Exception as error:
                logger.warning("moe-monitor: Ray's actors do not know their server: %r", error)
            return original(self, *args, **kwargs)

    setattr(start, _SENTINEL, original)
    setattr(cls, method, start)
