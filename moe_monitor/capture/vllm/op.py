"""The custom ops through which a router's decision, and the moment, leave compiled code.

On CPUs torch.compile traces straight through the router. A registered op stays in the graph as one opaque call, so
Python runs at every step, compiled or not. It claims to change ``ids``, though it only reads them: an op without
results or effects would be removed as dead code, and ``ids`` are always used afterwards. The op that marks a moment
claims to change a tensor for the same reason, and so that it stays where it is: behind what makes that tensor, before
what uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Observer = Callable[[int, Tensor, Tensor], None]
Clock = Callable[[int, int], None]

#: Enters vLLM's compile-cache key; change it whenever the traced graph changes.
GRAPH_VERSION = "2"

_observer: Observer | None = None
_clock: Clock | None = None
_library = torch.library.Library("moe_monitor", "FRAGMENT")
_library.define("observe(Tensor(a!) ids, Tensor logits, int layer) -> ()")
_library.define("mark(Tensor(a!) at, int layer, int point) -> ()")


def set_observer(observer: Observer | None) -> None:
    """Who receives (layer position, logits, ids); None for nobody. One model per process is monitored."""
    global _observer
    _observer = observer


def _observe(ids: Tensor, logits: Tensor, layer: int) -> None:
    if _observer is not None:
        _observer(layer, logits, ids)


def _observe_fake(ids: Tensor, logits: Tensor, layer: int) -> None:
    return None


def set_clock(clock: Clock | None) -> None:
    """Who is told that (layer position, point) is reached; None for nobody."""
    global _clock
    _clock = clock


def _mark(at: Tensor, layer: int, point: int) -> None:
    if _clock is not None:
        _clock(layer, point)


def _mark_fake(at: Tensor, layer: int, point: int) -> None:
    return None


for _key in ("CPU", "CUDA"):
    _library.impl("observe", _observe, _key)
    _library.impl("mark", _mark, _key)
torch.library.register_fake("moe_monitor::observe", _observe_fake, lib=_library)
torch.library.register_fake("moe_monitor::mark", _mark_fake, lib=_library)


def mark_compile_cache(vllm_config: Any, version: str) -> None:
    """The op changes the graph, so it must change the cache key: artefacts with and without it must not mix.

    ``additional_config`` is what vLLM hashes on behalf of plug-ins, late enough: at the first compilation.
    """
    extra = vllm_config.additional_config
    if isinstance(extra, dict) or extra is None:
        vllm_config.additional_config = {**(extra or {}), "moe_monitor_graph": version}
        return
    original = extra.compute_hash
    extra.compute_hash = lambda: f"{original()}-moe_monitor_graph-{version}"
