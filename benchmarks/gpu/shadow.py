"""An oracle inside the engine: what every router decided, copied in the graph, counted in plain torch.

Class-level patches below the monitor's seam. Each router's logits and ids are copied to buffers by kernels that are
captured into the CUDA graphs like the rest of the model; after each step of the model runner the real rows are counted
by the torch reference. Slow, but it shares neither retention nor tables, valid-token handling or Triton kernel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

ROWS: dict[int, torch.Tensor] = {}
_buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
_order: list[int] = []
_routers: list[Any] = []
_maximum = int(os.environ.get("SHADOW_ROWS", "16384"))
_scoring = "softmax"
_patched = False
TOKENS = 0


def _copy(router: object, logits: torch.Tensor, ids: torch.Tensor) -> None:
    key = id(router)
    if key not in _buffers:
        if logits.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("first seen under capture")
        _buffers[key] = (
            torch.zeros((_maximum, logits.shape[1]), dtype=logits.dtype, device=logits.device),
            torch.full((_maximum, ids.shape[1]), -1, dtype=torch.int64, device=ids.device),
        )
        _order.append(key)
        _routers.append(router)
    n = logits.shape[0]
    _buffers[key][0][:n].copy_(logits)
    _buffers[key][1][:n].copy_(ids)


def _after_step(start: int, n: int) -> None:
    global TOKENS
    from moe_monitor.capture.meter import accumulate
    from moe_monitor.layout import RowLayout

    TOKENS += n
    for position, key in enumerate(_order):
        logits, ids = _buffers[key]
        part = slice(start, start + n)
        rows = accumulate(logits[None, part], ids[None, part], _scoring, RowLayout(logits.shape[1]))[0]
        ROWS[position] = ROWS[position] + rows if position in ROWS else rows


def chosen(n: int) -> list[Any]:
    """What each layer's router chose for the first ``n`` rows of the last step: arrays [n, k] on the host."""
    return [_buffers[key][1][:n].cpu().numpy() for key in _order]


def routers() -> list[Any]:
    """The routers whose decisions were copied, in the order of the layers."""
    return list(_routers)


def nothing(runner: Any, scheduled: Any) -> None:
    """After a step: nothing more to do."""


def install(scoring: str = "softmax", after: Callable[[Any, Any], None] = nothing) -> None:
    """Patch vLLM's routers and model runners; before the model is loaded. ``after`` see :func:`patch_runner`."""
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    patch_routers(scoring)
    patch_runner(GPUModelRunner, positional_dummy=False, after=after)
    patch_runner(model_runner.GPUModelRunner, positional_dummy=True, after=after)


def patch_routers(scoring: str = "softmax") -> None:
    global _scoring, _patched
    _scoring = scoring
    if _patched:
        return
    _patched = True
    from vllm.model_executor.layers.fused_moe.router import base_router, router_factory

    assert router_factory  # imports every kind of router there is

    def patch_router(cls: type) -> None:
        original = cls._compute_routing

        def compute(self, hidden_states, router_logits, *args, **kwargs):
            weights, ids = original(self, hidden_states, router_logits, *args, **kwargs)
            _copy(self, router_logits, ids)
            return weights, ids

        cls._compute_routing = compute

    waiting = base_router.BaseRouter.__subclasses__()
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if "_compute_routing" in vars(cls):
            patch_router(cls)


def patch_runner(cls, positional_dummy: bool, after: Callable[[Any, Any], None] = nothing) -> None:
    """``positional_dummy``: execute_model's third argument says that the pass is a dummy (V2). ``after`` is called with
    the runner and the scheduler's output when a real step has been counted.
    """
    original = cls.execute_model

    def execute(self, scheduler_output, *args, **kwargs):
        real = not (kwargs.get("dummy_run", False) or (positional_dummy and len(args) > 1 and args[1]))
        result = original(self, scheduler_output, *args, **kwargs)
        n = scheduler_output.total_num_scheduled_tokens
        # the V2 runner tries itself out with requests of its own
        real = real and not all(name.startswith("_warmup_") for name in scheduler_output.num_scheduled_tokens)
        if real and n and not getattr(self, "shadow_off", False):
            _after_step(0, n)
            after(self, scheduler_output)
        return result

    cls.execute_model = execute


def compare(rows: torch.Tensor, layout) -> dict[str, int]:
    """Largest difference by column group between the monitor's rows and the shadow's."""
    mine = torch.stack([ROWS[i] for i in range(len(ROWS))]).cpu()
    difference = (torch.as_tensor(rows) - mine).abs()
    return {name: int(difference[:, span].max()) for name, span in layout.offsets.items()}
