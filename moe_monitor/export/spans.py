"""OpenTelemetry: a span ``moe.routing`` under vLLM's ``llm_request`` for each traced request.

The spans go through a small pipeline of their own rather than vLLM's: they leave within a second, they cannot push
vLLM's spans out of its queue, and what is lost can be counted. Names and attributes: ``docs/tracing.md``.
"""

from __future__ import annotations

import atexit
import math
import threading
from collections.abc import Callable
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

from moe_monitor import __version__
from moe_monitor.export.requests import Summary, least, mean, most

PARENT, NAME, LAYER_EVENT = "llm_request", "moe.routing", "moe.layer"

#: Spans that wait to be sent, and how often they are. Milliseconds.
QUEUE, DELAY = 2048, 500

_LONGEST_LIST = 256


def attributes(summary: Summary) -> dict[str, Any]:
    """Attributes of the span; what is not known is left out."""
    record = summary.record
    made: dict[str, Any] = {
        "moe.model": record.model_name,
        "moe.engine": record.engine,
        "moe.layers": len(record.layers),
        "moe.experts": summary.experts,
        "moe.top_k": summary.top_k,
        "moe.tokens.prefill": summary.prefill,
        "moe.tokens.decode": summary.decode,
        "moe.tokens.cached": record.meta.cached_tokens,
        "moe.preemptions": record.meta.preemptions,
        "moe.router.entropy.mean": mean(summary.entropy),
        "moe.router.entropy.min": least(summary.entropy_min),
        "moe.router.top1.mean": mean(summary.top1),
        "moe.router.selected_mass.mean": mean(summary.mass),
        "moe.imbalance.mean": mean(summary.imbalance),
        "moe.imbalance.max": most(summary.imbalance),
        "moe.imbalance.by_chance": mean(summary.chance),
        "moe.concentration": summary.concentration,
        "moe.drift.bits": mean(summary.drift),
        "moe.drift.floor.bits": mean(summary.drift_floor),
    }
    made = {k: v for k, v in made.items() if not (isinstance(v, float) and math.isnan(v))}
    made["moe.top_experts"] = [
        f"{layer}:" + ",".join(f"{expert}={share:.4f}" for expert, share in summary.top_experts(i))
        for i, layer in enumerate(record.layers[:_LONGEST_LIST])
    ]
    return made


def layer_attributes(summary: Summary, layer: int) -> dict[str, Any]:
    """Attributes of a layer's event; ``layer`` is a position."""
    values = {
        "moe.router.entropy.mean": summary.entropy[layer],
        "moe.router.entropy.min": summary.entropy_min[layer],
        "moe.router.top1.mean": summary.top1[layer],
        "moe.router.selected_mass.mean": summary.mass[layer],
        "moe.imbalance": summary.imbalance[layer],
        "moe.imbalance.by_chance": summary.chance[layer],
        "moe.drift.bits": summary.drift[layer],
    }
    made: dict[str, Any] = {"moe.layer": summary.record.layers[layer]}
    made |= {k: float(v) for k, v in values.items() if not math.isnan(v)}
    return made | {"moe.top_experts": [f"{expert}={share:.4f}" for expert, share in summary.top_experts(layer)]}


class Parent:
    """Context and times (ns) of an ``llm_request`` span that has ended."""

    def __init__(self, span: Any) -> None:
        self.context = span.context
        self.start, self.end = span.start_time, span.end_time

    @property
    def trace_id(self) -> str:
        return format(self.context.trace_id, "032x")


class Noticing(SpanProcessor):  # type: ignore[misc]  # OpenTelemetry is optional, to mypy it is Any
    """Notices ``llm_request`` spans that end while :attr:`request` names the request of this thread."""

    def __init__(self, notice: Callable[[str, Parent], None]) -> None:
        self._notice = notice
        self._local = threading.local()

    @property
    def request(self) -> str:
        return str(getattr(self._local, "request", ""))

    @request.setter
    def request(self, value: str) -> None:
        self._local.request = value

    def on_end(self, span: Any) -> None:
        if span.name == PARENT and self.request and span.context.trace_flags.sampled:
            self._notice(self.request, Parent(span))


class _Counting:
    """An exporter that counts what came through and what did not."""

    def __init__(self, exporter: Any) -> None:
        self._exporter = exporter
        self.taken = self.failed = 0

    def export(self, spans: Any) -> Any:
        self.taken += len(spans)
        try:
            result = self._exporter.export(spans)
        except BaseException:
            self.failed += len(spans)
            raise
        if result is not SpanExportResult.SUCCESS:
            self.failed += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))


class Emitter:
    """Emits ``moe.routing`` spans through ``exporter``, on behalf of the service that ``provider`` describes.

    events: also an event per layer. Never waits: what does not fit the queue is dropped and counted.
    """

    def __init__(self, exporter: Any, provider: Any, *, events: bool = False) -> None:
        self._counting = _Counting(exporter)
        self._events = events
        self._emitted = self._refused = 0
        self._provider = TracerProvider(resource=provider.resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(self._counting, max_queue_size=QUEUE, schedule_delay_millis=DELAY)
        )
        self._tracer = self._provider.get_tracer("moe_monitor", __version__)
        atexit.register(self.close)

    @property
    def dropped(self) -> int:
        return self._refused + self._counting.failed

    def emit(self, parent: Parent, summary: Summary) -> None:
        """The span of one request, as long as its parent."""
        if self._emitted - self._counting.taken >= QUEUE:
            self._refused += 1
            return
        self._emitted += 1
        context = trace.set_span_in_context(trace.NonRecordingSpan(parent.context))
        span = self._tracer.start_span(NAME, context=context, start_time=parent.start, attributes=attributes(summary))
        if self._events:
            for i in range(len(summary.record.layers)):
                span.add_event(LAYER_EVENT, layer_attributes(summary, i), timestamp=parent.end)
        span.end(end_time=parent.end)

    def close(self) -> None:
        """Send what waits, for two seconds at most: a receiver that is gone must not hold up the server's end."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(timeout=2)
