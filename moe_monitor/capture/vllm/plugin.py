"""The plugin's entry point, called by vLLM in every process, possibly more than once.

It only arms hooks that fire when vLLM imports the modules concerned, so it costs next to nothing in a process that
never imports them and must not import anything heavy itself. Nothing here may raise: vLLM does not start when a
plugin does.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

    from moe_monitor.capture.vllm.imports import Hook

#: The attribute by which a function of ours keeps vLLM's own, so that nothing is patched twice; of a model runner, its
#: Capture.
SENTINEL = "_moe_monitor"

#: Ties the boards of a server's workers to its API servers: set in the process that starts them, inherited by them.
#: Not a setting, hence without the settings' prefix.
SERVER_VARIABLE = "_MOE_MONITOR_SERVER"

#: The same for actors of Ray, which have its daemon's environment instead: set while they are being started.
ACTORS_VARIABLE = "_MOE_MONITOR_SERVER_OF_ACTORS"

#: Where vLLM keeps the names of variables that it passes on to actors.
RAY_NAMES = "vllm.ray.ray_env"

#: Modules that vLLM imports, each with our function (in this package) that patches it.
SEAMS = (
    ("vllm.v1.worker.gpu_model_runner", "runner_v1", "patch_gpu"),
    ("vllm.v1.worker.cpu_model_runner", "runner_v1", "patch_cpu"),
    ("vllm.v1.worker.gpu.model_runner", "runner_v2", "patch_runner"),
    ("vllm.v1.worker.gpu.cudagraph_utils", "runner_v2", "patch_graphs"),
    ("vllm.v1.worker.gpu.warmup", "runner_v2", "patch_warmup"),
    ("vllm.v1.metrics.loggers", "frontend", "patch_loggers"),
    ("vllm.v1.engine.input_processor", "tracing", "patch_input"),
    ("vllm.v1.engine.output_processor", "tracing", "patch_output"),
    ("vllm.entrypoints.serve.instrumentator.metrics", "frontend", "patch_metrics"),
    ("vllm.v1.utils", "beside", "patch_utils"),
    ("vllm.v1.engine.utils", "beside", "patch_engines"),
    ("vllm.v1.engine.utils", "actors", "patch_manager"),
    ("vllm.v1.engine.core", "loops", "patch_core"),
    ("vllm.v1.executor.multiproc_executor", "loops", "patch_workers"),
    ("vllm.v1.executor.multiproc_executor", "beside", "patch_workers"),
    (RAY_NAMES, "actors", "patch_names"),
    ("vllm.v1.executor.ray_executor", "actors", "patch_first"),
    ("vllm.v1.executor.ray_executor_v2", "actors", "patch_second"),
)

#: How vLLM's supervisor names its servers, before the rank.
SUPERVISED = "APIServer_DPRank_"

_armed = False


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``. Never raises."""
    global _armed
    if _armed:
        return
    _armed = True
    if os.environ.get("MOE_MONITOR_ENABLED", "").strip().lower() in ("0", "false", "no", "off"):
        # vLLM stays untouched, but for its list of what actors of Ray get, which are to be switched off, too.
        names = getattr(sys.modules.get(RAY_NAMES), "DEFAULT_ENV_VAR_PREFIXES", None)
        if isinstance(names, set):
            names.add("MOE_MONITOR_ENABLED")
        return
    try:
        _arm()
    except Exception as error:
        import logging

        logger = logging.getLogger("vllm.moe_monitor")
        logger.warning("moe-monitor could not start, serving goes on without it: %r", error)


def _arm() -> None:
    from moe_monitor.capture.vllm.imports import when_imported

    told = os.environ.pop(ACTORS_VARIABLE, "") if _is_actor() else ""
    if told or not _is_child() or SERVER_VARIABLE not in os.environ:
        os.environ[SERVER_VARIABLE] = told or f"{os.getpid()}-{os.urandom(4).hex()}"
    for module, file, function in SEAMS:
        when_imported(module, _patcher(file, function))


def _is_child() -> bool:
    """Whether multiprocessing, which then is loaded, started this process for a server that has armed before. The
    servers of a supervisor are children, too, but not its own.
    """
    parent = getattr(sys.modules.get("multiprocessing.process"), "parent_process", None)
    return parent is not None and parent() is not None and supervised() is None


def supervised() -> int | None:
    """The data-parallel rank of this process where it is one of the servers that vLLM's supervisor starts: each has a
    port and an engine of its own.
    """
    current = getattr(sys.modules.get("multiprocessing.process"), "current_process", None)
    _, named, rank = ("" if current is None else current().name).partition(SUPERVISED)
    return int(rank) if named and rank.isdigit() else None


def _is_actor() -> bool:
    """Whether this process is an actor of Ray's, which is loaded in every such process."""
    ray = sys.modules.get("ray")
    try:
        return ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
    except Exception:  # another version of Ray, or one that is being imported
        return False


def _patcher(file: str, function: str) -> Hook:
    def patch(module: ModuleType) -> None:
        from importlib import import_module

        getattr(import_module(f"moe_monitor.capture.vllm.{file}"), function)(module)

    return patch
