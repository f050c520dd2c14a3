"""What is put on the objects of a live model, and taken off again.

The seam is ``BaseRouter._compute_routing``, wrapped on each live router: it alone sees the logits and the chosen
logical expert ids together, before expert-parallel load balancing maps them to physical replicas, and leaves the one
slot of ``set_capture_fn`` to vLLM's own use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from moe_monitor.capture import quick
from moe_monitor.capture.clock import ROUTE_BEGIN, ROUTE_END
from moe_monitor.capture.cuda import CudaMeter
from moe_monitor.capture.vllm.context import splits

if TYPE_CHECKING:
    from moe_monitor.capture.vllm.attach import Capture

Routing = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Wrapping:
    """Replaced attributes of live objects."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []

    def put(self, target: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Put ``replacement`` on a live object; :meth:`undo` takes it off."""
        self._replaced.append((target, name, target.__dict__.get(name)))
        setattr(target, name, replacement)

    def undo(self) -> None:
        while self._replaced:
            target, name, own = self._replaced.pop()
            if own is None:
                delattr(target, name)
            else:
                setattr(target, name, own)


def traced_routing(router: Any, position: int, *, timed: bool) -> Routing:
    """Where torch.compile traces through the router (CPU): the decision leaves through an op."""
    original: Routing = router._compute_routing

    def compute_routing(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if timed:
            torch.ops.moe_monitor.mark(router_logits, position, ROUTE_BEGIN)
        weights, ids = original(hidden_states, router_logits, *args, **kwargs)
        torch.ops.moe_monitor.observe(ids, router_logits, position)
        return weights, ids

    return compute_routing


def opaque_routing(router: Any, position: int, capture: Capture) -> Routing:
    """Where the whole MoE layer is one opaque op to the compiler (CUDA): plain Python, no op of ours."""
    original: Routing = router._compute_routing

    def compute_routing(
        hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        timing = capture.timing
        if timing is not None and timing.noting is None:
            timing = None  # one look for both points
        if timing is not None:
            timing.point(position, ROUTE_BEGIN)
        weights, ids = original(hidden_states, router_logits, *args, **kwargs)
        if timing is not None:
            timing.point(position, ROUTE_END)
        capture.observe_cuda(position, router_logits, ids)
        return weights, ids

    meter = capture.meter
    if not isinstance(meter, CudaMeter):
        return compute_routing
    return quick.routing(meter, position, original, compute_routing, splits() if capture.parallel.alone else None)
