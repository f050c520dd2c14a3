"""What a worker's board says of the process that writes it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import moe_monitor
from moe_monitor.capture.vllm.plugin import SERVER_VARIABLE


def served_name(config: Any) -> str:
    """The model's name in vLLM's own metrics."""
    served = config.model_config.served_model_name
    return str(served[0] if isinstance(served, list) else served)


def process_identity(config: Any) -> dict[str, Any]:
    """Which server, engine and rank this is, by vLLM's configuration; the names are those of the board's identity."""
    import vllm.envs

    parallel = config.parallel_config
    engine = int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))
    return {
        "version": moe_monitor.__version__,
        "producer": "vllm",
        "producer_version": vllm.__version__,
        "server": os.environ.get(SERVER_VARIABLE, str(os.getpid())),
        "model_name": served_name(config),
        "engine": str(engine),
        "rank": {"global": int(parallel.rank), "dp": engine},
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.time(),
    } | ({"rust_frontend": True} if getattr(vllm.envs, "VLLM_USE_RUST_FRONTEND", False) else {})


def board_name(identity: Mapping[str, Any]) -> str:
    """Unique among the servers of a machine, their engines and ranks."""
    return f"{identity['server']}.{identity['engine']}.{identity['rank']['global']}"
