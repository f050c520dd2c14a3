"""Seam: model runner V1 (``vllm.v1.worker.gpu_model_runner`` and its CPU subclass).

``load_model`` is where the model exists for the first time. ``execute_model`` brings the scheduler's decision and is
never called for warm-up, profiling or graph capture (those call the model through ``_dummy_run``); inside it
``_model_forward`` runs exactly the pass, within vLLM's forward context.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moe_monitor.capture.vllm.runners import patch_load_model

if TYPE_CHECKING:
    from moe_monitor.capture.vllm.attach import Capture


def patch_gpu(module: ModuleType) -> None:
    """Hook for ``vllm.v1.worker.gpu_model_runner``."""
    patch_load_model(module.GPUModelRunner, _patch_steps)


def patch_cpu(module: ModuleType) -> None:
    """Hook for ``vllm.v1.worker.cpu_model_runner``, whose class loads the model on its own."""
    patch_load_model(module.CPUModelRunner, _patch_steps)


def _patch_steps(runner: Any, capture: Capture) -> None:
    execute_model, model_forward = runner.execute_model, runner._model_forward
    fuse, begin_step, (live, meter, timing) = capture.fuse, capture.begin_step, capture.short()
    # (numbers alone: the scheduler's output may hold what a request brought, and a server may rest for hours)
    tokens, per_request = 0, {}

    @functools.wraps(execute_model)
    def execute(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal tokens, per_request
        tokens, per_request = scheduler_output.total_num_scheduled_tokens, scheduler_output.num_scheduled_tokens
        try:
            if not fuse.blown and (live or scheduler_output.scheduled_new_reqs):
                begin_step(scheduler_output)
        except Exception as error:
            fuse.blow("requests", error)
        return execute_model(scheduler_output, *args, **kwargs)

    @functools.wraps(model_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        passes = timing.passes + 1
        if meter.clean and passes < timing.soonest and not fuse.blown:  # most passes: see quick.py
            timing.passes = passes
            meter.counted, meter.valid, meter.turn = None, tokens, 0
        else:
            capture.begin_pass(tokens, per_request)
        if live:
            batch = getattr(runner, "input_batch", None)
            starts = getattr(runner, "query_start_loc", None)
            capture.trace_rows(batch, tokens, per_request, tokens, "num_computed_tokens_cpu", starts)
        result = model_forward(*args, **kwargs)
        if meter.clean and meter.counted is not None and meter.valid == tokens and not fuse.blown:
            meter.valid = 0
            meter.passes += 1
        else:
            capture.end_pass(tokens)
        return result

    runner.execute_model = execute
    runner._model_forward = forward
