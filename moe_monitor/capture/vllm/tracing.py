"""Seam: the engine's front end (``vllm.v1.engine.input_processor`` and ``output_processor``).

Workers do not see trace headers, so the wish of a sampled ``traceparent`` is written into the request's own sampling
parameters here, where ``vllm_xargs`` also end up. When a request has finished, its latencies and its ``llm_request``
span are noted; a thread matches them with what the workers hand over.
"""

from __future__ import annotations

import atexit
import functools
import logging
import math
import os
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from moe_monitor import settings
from moe_monitor.capture.vllm.plugin import SENTINEL, SERVER_VARIABLE
from moe_monitor.export.frontend import Finished, FrontEnd

logger = logging.getLogger("vllm.moe_monitor")

_WISH = "moe_trace"

_made = False
_front: FrontEnd | None = None
#: Names the request whose span is made, to the span processor; None until vLLM makes the first one.
_noticing: Any = None


def front_end() -> FrontEnd | None:
    """This process's front end, made at the first call; None when requests are not traced."""
    global _made, _front
    if not _made:
        _made = True
        try:
            configured = settings.load()
        except settings.SettingsError:  # the worker says so
            return None
        if configured.max_traced:
            from moe_monitor.capture.vllm.frontend import collector
            from moe_monitor.export.requests import FleetLoad

            server = os.environ.get(SERVER_VARIABLE, str(os.getpid()))
            _front = FrontEnd(configured.dir, server, FleetLoad(collector()), logger)
            atexit.register(_front.close)
    return _front if _front is not None and not _front.failed else None


def patch_input(module: ModuleType) -> None:
    """Hook for ``vllm.v1.engine.input_processor``: the caller's trace decides, unless the request itself does."""
    cls = module.InputProcessor
    original: Callable[..., Any] = cls.process_inputs
    if hasattr(original, SENTINEL):
        return

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        try:
            if request.trace_headers and request.sampling_params is not None:
                _pass_on(request.trace_headers, request.sampling_params)
        except Exception as error:
            _report("reading traceparent", error)
        return request

    setattr(process_inputs, SENTINEL, original)
    cls.process_inputs = process_inputs


def _pass_on(headers: Any, params: Any) -> None:
    parts = str(headers.get("traceparent", "")).split("-")
    if len(parts) < 4 or len(parts[3]) != 2 or _WISH in (params.extra_args or {}):
        return
    sampled = int(parts[3], 16) & 1
    params.extra_args = {**(params.extra_args or {}), _WISH: sampled}  # a new one: the caller may share the old


def patch_output(module: ModuleType) -> None:
    """Hook for ``vllm.v1.engine.output_processor``: notice finished requests and their spans."""
    cls = module.OutputProcessor
    finished: Callable[..., None] = cls._update_stats_from_finished
    do_tracing: Callable[..., None] = cls.do_tracing
    if hasattr(finished, SENTINEL):
        return

    @functools.wraps(finished)
    def update(self: Any, req_state: Any, finish_reason: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        finished(self, req_state, finish_reason, iteration_stats, *args, **kwargs)
        try:
            front = front_end()
            if front is not None:
                front.finish(req_state.request_id, _latencies(self, req_state, iteration_stats))
        except Exception as error:
            _report("noting a finished request", error)

    @functools.wraps(do_tracing)
    def traced(self: Any, engine_core_output: Any, req_state: Any, *args: Any, **kwargs: Any) -> None:
        front = _begin_span(req_state)
        try:
            do_tracing(self, engine_core_output, req_state, *args, **kwargs)
        finally:
            if front is not None:
                _end_span(front, req_state)

    setattr(update, SENTINEL, finished)
    cls._update_stats_from_finished = update
    cls.do_tracing = traced


def _latencies(processor: Any, req_state: Any, iteration_stats: Any) -> Finished:
    noted = Finished(at=time.monotonic(), complete=not processor.tracing_enabled)
    stats = req_state.stats
    if stats is None or iteration_stats is None:
        return noted
    noted.e2e = iteration_stats.iteration_timestamp - stats.arrival_time
    if stats.num_generation_tokens:
        noted.ttft = stats.first_token_latency
    after_first = stats.num_generation_tokens - 1
    noted.tpot = (stats.last_token_ts - stats.first_token_ts) / after_first if after_first > 0 else math.nan
    return noted


def _begin_span(req_state: Any) -> FrontEnd | None:
    try:
        front = front_end()
        if front is not None:
            if _noticing is None:
                _notice_spans(front)
            _noticing.request = req_state.request_id
        return front
    except Exception as error:
        _report("noticing spans", error)
        return None


def _end_span(front: FrontEnd, req_state: Any) -> None:
    try:
        _noticing.request = ""
        front.complete(req_state.request_id)
    except Exception as error:
        _report("noticing spans", error)


def _notice_spans(front: FrontEnd) -> None:
    """vLLM makes its first span: watch its provider, and send ours to where it sends its own."""
    global _noticing
    from opentelemetry import trace
    from vllm.tracing.otel import get_span_exporter

    from moe_monitor.export.spans import Emitter, Noticing

    provider = trace.get_tracer_provider()
    noticing = Noticing(front.notice)
    exporter = get_span_exporter(os.environ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
    emitter = Emitter(exporter, provider, events=settings.load().span_events)
    provider.add_span_processor(noticing)
    front.emit, front.dropped_spans = emitter.emit, lambda: emitter.dropped
    _noticing = noticing


def _report(where: str, error: Exception) -> None:
    if _front is not None:
        _front.fail(where, error)
    else:
        logger.debug("moe-monitor: %s failed: %r", where, error)
