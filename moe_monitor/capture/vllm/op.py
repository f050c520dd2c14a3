"""The custom op through which a router's decision leaves compiled code.

On CPUs torch.compile traces straight through the router. A registered op stays in the graph as one opaque call, so
Python runs at every step, compiled or not. It claims to change ``ids``, though it only reads them: an op without
results or effects would be removed as dead code, and ``ids`` are always used afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Observer = Callable[[int, Tensor, Tensor], None]

#: Enters vLLM's compile-cache key; change it whenever the traced graph changes.
GRAPH_VERSION = "1"

_observer: Observer | None = None
_library = torch.library.Library("moe_monitor", "FRAGMENT")
_library.define("observe(Tensor(a!) ids, Tensor logits, int layer) -> ()")


def set_observer(observer: Observer | None) -> None:
    """Who receives (layer position, logits, ids); None for nobody. One model per process is monitored."""
    global _observer
    _observer = observer


def _observe(ids: Tensor, logits: Tensor, layer: int) -> None:
    if _observer is not None:
        _observer(layer, logits, ids)


def _observe_fake(ids: Tensor, logits: Tensor, layer: int) -> None:
    return None


for _key in ("CPU", "CUDA"):
    _library.impl("observe", _observe, _key)
torch.library.register_fake("moe_monitor::observe", _observe_fake, lib=_library)
