"""Seam: actors of Ray (``vllm.ray.ray_env``, both Ray executors, the manager of data-parallel engines under Ray).

An actor has the environment of Ray's daemon, and what vLLM passes on. The daemon may have been started by another
server of ours. So which server an actor belongs to is told in a variable that exists only while actors are being
started, and that only actors look at (``plugin.py``).
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from moe_monitor import settings
from moe_monitor.capture.vllm.plugin import ACTORS_VARIABLE, SENTINEL, SERVER_VARIABLE

logger = logging.getLogger("vllm.moe_monitor")


def patch_names(module: ModuleType) -> None:
    """Hook for ``vllm.ray.ray_env``: variables of ours are passed on, too. Not by the variable that vLLM has for that,
    which is part of the key of its compile cache.
    """
    module.DEFAULT_ENV_VAR_PREFIXES.update((settings.PREFIX, ACTORS_VARIABLE))


def patch_first(module: ModuleType) -> None:
    """Hook for ``vllm.v1.executor.ray_executor``: its workers get the variables named in ``vllm.ray.ray_env``."""
    _while_told(module.RayDistributedExecutor, "_init_workers_ray")


def patch_manager(module: ModuleType) -> None:
    """Hook for ``vllm.v1.engine.utils``: data-parallel engines that are actors get them as well."""
    _while_told(module.CoreEngineActorManager, "__init__", before=_start_ray)


def patch_second(module: ModuleType) -> None:
    """Hook for ``vllm.v1.executor.ray_executor_v2``: its workers get only what the daemon has not. So ours go into the
    environment that their processes start with.
    """
    cls = module.RayExecutorV2
    original: Callable[..., dict[str, Any]] = cls._build_runtime_env
    if hasattr(original, SENTINEL):
        return

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        made = original(self, *args, **kwargs)
        try:
            variables = made.setdefault("env_vars", {})
            for name, value in os.environ.items():
                if name.startswith(settings.PREFIX):
                    variables.setdefault(name, value)  # what the user has said for actors comes first
            variables[ACTORS_VARIABLE] = os.environ[SERVER_VARIABLE]
        except Exception as error:
            _say(error)
        return made

    setattr(build, SENTINEL, original)
    cls._build_runtime_env = build


def _start_ray() -> None:
    """As the manager does where nobody has: a daemon that it starts must not get the variable, for it would pass it on
    to the actors of others.
    """
    import ray  # type: ignore[import-not-found, unused-ignore]

    if not ray.is_initialized():
        ray.init()


def _while_told(cls: Any, method: str, before: Callable[[], None] = lambda: None) -> None:
    original = getattr(cls, method)
    if hasattr(original, SENTINEL):
        return

    @functools.wraps(original)
    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            before()
            os.environ[ACTORS_VARIABLE] = os.environ[SERVER_VARIABLE]
        except Exception as error:
            _say(error)
        try:
            return original(self, *args, **kwargs)
        finally:
            os.environ.pop(ACTORS_VARIABLE, None)

    setattr(start, SENTINEL, original)
    setattr(cls, method, start)


def _say(error: Exception) -> None:
    logger.warning("moe-monitor: Ray's actors do not know their server: %r", error)
