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

#: Ties the boards of a server's workers to its API servers: set in the process that starts them, inherited by them.
#: Not a setting, hence without the settings' prefix.
SERVER_VARIABLE = "_MOE_MONITOR_SERVER"

#: vLLM's variable: beginnings of the names of variables that actors of Ray are to have, too.
RAY_VARIABLE = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"

#: Module that vLLM imports -> our function (in this package) that patches it.
SEAMS = {
    "vllm.v1.worker.gpu_model_runner": ("runner_v1", "patch_gpu"),
    "vllm.v1.worker.cpu_model_runner": ("runner_v1", "patch_cpu"),
    "vllm.v1.worker.gpu.model_runner": ("runner_v2", "patch_runner"),
    "vllm.v1.worker.gpu.cudagraph_utils": ("runner_v2", "patch_graphs"),
    "vllm.v1.worker.gpu.warmup": ("runner_v2", "patch_warmup"),
    "vllm.v1.metrics.loggers": ("frontend", "patch_loggers"),
    "vllm.v1.engine.input_processor": ("tracing", "patch_input"),
    "vllm.v1.engine.output_processor": ("tracing", "patch_output"),
    "vllm.entrypoints.serve.instrumentator.metrics": ("frontend", "patch_metrics"),
    "vllm.v1.utils": ("beside", "patch_utils"),
    "vllm.v1.engine.utils": ("beside", "patch_engines"),
}

_armed = False


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``. Never raises."""
    global _armed
    if _armed:
        return
    _armed = True
    if os.environ.get("MOE_MONITOR_ENABLED", "").strip().lower() in ("0", "false", "no", "off"):
        return  # vLLM stays untouched
    try:
        _arm()
    except Exception as error:
        import logging

        logger = logging.getLogger("vllm.moe_monitor")
        logger.warning("moe-monitor could not start, serving goes on without it: %r", error)


def _arm() -> None:
    from moe_monitor.capture.vllm.imports import when_imported

    if not _is_of_the_server_before() or SERVER_VARIABLE not in os.environ:
        os.environ[SERVER_VARIABLE] = f"{os.getpid()}-{os.urandom(4).hex()}"
    _let_ray_pass_on(SERVER_VARIABLE, "MOE_MONITOR_")
    for module, (file, function) in SEAMS.items():
        when_imported(module, _patcher(file, function))


#: How vLLM's supervisor names the servers that it starts, one a data-parallel rank, each with a port and an engine.
SUPERVISED = "APIServer_DPRank_"


def _is_of_the_server_before() -> bool:
    """Whether multiprocessing or Ray started this process for a server that has armed before. Either is loaded in every
    process that it starts.
    """
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.parent_process() is not None:
        # (Behind Rust front ends there are no API servers to tell apart: the exporter of the first shows all engines.)
        rust = os.environ.get("VLLM_USE_RUST_FRONTEND", "").strip() not in ("", "0")
        return rust or not processes.current_process().name.startswith(SUPERVISED)
    ray = sys.modules.get("ray")
    try:
        return ray is not None and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
    except Exception:  # another version of Ray, or one that is being imported
        return False


def _let_ray_pass_on(*prefixes: str) -> None:
    """Actors of Ray do not inherit the environment. vLLM passes on what begins as this variable of its own says."""
    known = [name.strip() for name in os.environ.get(RAY_VARIABLE, "").split(",") if name.strip()]
    os.environ[RAY_VARIABLE] = ",".join(dict.fromkeys([*known, *prefixes]))


def _patcher(file: str, function: str) -> Hook:
    def patch(module: ModuleType) -> None:
        from importlib import import_module

        getattr(import_module(f"moe_monitor.capture.vllm.{file}"), function)(module)

    return patch
