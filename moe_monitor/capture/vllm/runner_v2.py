"""Seam: model runner V2 (``vllm.v1.worker.gpu.model_runner``).

Its ``execute_model`` also runs the dummy passes, marked as such, and at start-up a few passes of made-up requests that
look like real ones in all but who calls. Full graphs are captured and replayed by its graph manager, outside vLLM's
forward context, so the manager's own descriptor names them; piecewise graphs are named by the forward context as in V1.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moe_monitor.capture.vllm.plugin import SENTINEL
from moe_monitor.capture.vllm.runners import patch_load_model

if TYPE_CHECKING:
    from moe_monitor.capture.vllm.attach import Capture

#: The monitored model of this process; the graph manager does not know its runner.
_active: Capture | None = None

#: On so many streams the graph manager captures.
_streams = 1


def patch_runner(module: ModuleType) -> None:
    """Hook for ``vllm.v1.worker.gpu.model_runner``."""
    patch_load_model(module.GPUModelRunner, _patch_steps)


def _patch_steps(runner: Any, capture: Capture) -> None:
    global _active
    _active, capture.capture_streams = capture, _streams
    execute_model, prepare_inputs = runner.execute_model, getattr(runner, "prepare_inputs", None)
    if prepare_inputs is None:
        capture.tracer = None  # counting does without it, tracing requests does not
    fuse, begin_step, (live, meter, timing) = capture.fuse, capture.begin_step, capture.short()
    begun = prepared = 0  # tokens, as the pass in progress was told, and of the batch that it was given

    @functools.wraps(execute_model)
    def execute(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # (scheduler_output, intermediate_tensors=None, dummy_run=False, ...)
        nonlocal begun, prepared
        tokens = scheduler_output.total_num_scheduled_tokens
        made_up = capture.warming_up or kwargs.get("dummy_run", len(args) > 1 and args[1])
        if made_up or tokens == 0:
            capture.begin_dummy()
            if not made_up:
                begin_step(scheduler_output)  # traced requests may have finished
            return execute_model(scheduler_output, *args, **kwargs)
        begun, prepared, passes = tokens, 0, timing.passes + 1
        try:
            if not fuse.blown and (live or scheduler_output.scheduled_new_reqs):
                begin_step(scheduler_output)
        except Exception as error:
            fuse.blow("requests", error)
        if meter.clean and passes < timing.soonest and not fuse.blown:  # most passes: see quick.py
            timing.passes = passes
            meter.counted, meter.valid, meter.turn = None, tokens, 0
        else:
            capture.begin_pass(tokens, scheduler_output.num_scheduled_tokens)
        result = execute_model(scheduler_output, *args, **kwargs)
        if fuse.blown:
            return result
        if meter.clean and meter.counted is not None and meter.valid == prepared == tokens:
            meter.valid = 0
            meter.passes += 1
            return result
        ran = None
        try:
            state = runner.execute_model_state
            if state is not None:  # None: the runner found nothing to do
                # Adaptive verification may drop draft tokens that were scheduled.
                ran = int(state.input_batch.num_tokens)
        except Exception as error:
            fuse.blow("record", error)
        if ran is not None:
            capture.end_pass(ran)
        return result

    runner.execute_model = execute
    if prepare_inputs is None:
        return

    @functools.wraps(prepare_inputs)
    def prepare(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # Never called for dummy passes; what it returns tells the order of the rows.
        nonlocal prepared
        batch = prepare_inputs(scheduler_output, *args, **kwargs)
        if capture.warming_up or fuse.blown:
            return batch
        try:
            prepared = batch.num_tokens
            if prepared != begun:
                capture.batch_is(batch)
        except Exception as error:
            fuse.blow("record", error)
        if live:
            starts = getattr(batch, "query_start_loc_np", None)
            per_request, total = scheduler_output.num_scheduled_tokens, scheduler_output.total_num_scheduled_tokens
            capture.trace_rows(batch, None, per_request, total, "num_computed_tokens_np", starts)
        return batch

    runner.prepare_inputs = prepare


def patch_warmup(module: ModuleType) -> None:
    """Hook for ``vllm.v1.worker.gpu.warmup``: nothing that runs within ``warmup_kernels`` is a server's work."""
    original = module.warmup_kernels
    if hasattr(original, SENTINEL):
        return

    @functools.wraps(original)
    def warmup_kernels(model_runner: Any, *args: Any, **kwargs: Any) -> Any:
        capture = getattr(model_runner, SENTINEL, None)
        if capture is None:
            return original(model_runner, *args, **kwargs)
        capture.warming_up = True
        try:
            return original(model_runner, *args, **kwargs)
        finally:
            capture.warming_up = False

    setattr(warmup_kernels, SENTINEL, original)
    module.warmup_kernels = warmup_kernels  # type: ignore[attr-defined]


def patch_graphs(module: ModuleType) -> None:
    """Hook for ``vllm.v1.worker.gpu.cudagraph_utils``: name full graphs by the manager's descriptor."""
    global _streams
    # before vLLM 0.29 full graphs are captured on torch's own stream for that, those in pieces on the current one
    _streams = 1 if hasattr(module, "current_stream") else 2
    base, manager = module.CudaGraphManager, module.ModelCudaGraphManager
    capture_all, replay, run_piecewise = base.capture, manager.run_fullgraph, base.run_pw_graph
    if hasattr(replay, SENTINEL):
        return

    @functools.wraps(capture_all)
    def capture(self: Any, create_forward_fn: Any, *args: Any, **kwargs: Any) -> Any:
        if _active is None or not isinstance(self, manager):
            return capture_all(self, create_forward_fn, *args, **kwargs)
        watching = _active

        def create(desc: Any, *fn_args: Any, **fn_kwargs: Any) -> Any:
            watching.begin_dummy()
            watching.capturing = ("FULL", desc)
            return create_forward_fn(desc, *fn_args, **fn_kwargs)

        try:
            return capture_all(self, create, *args, **kwargs)
        finally:
            watching.capturing = None

    @functools.wraps(replay)
    def run_fullgraph(self: Any, desc: Any) -> Any:
        if _active is not None and _active.names_graphs:
            _active.note_graph(("FULL", desc))
        return replay(self, desc)

    @functools.wraps(run_piecewise)
    def run_pw_graph(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _active is not None and _active.names_graphs and isinstance(self, manager):
            _active.note_graph()
        return run_piecewise(self, *args, **kwargs)

    setattr(run_fullgraph, SENTINEL, replay)
    base.capture = capture
    manager.run_fullgraph = run_fullgraph
    base.run_pw_graph = run_pw_graph
