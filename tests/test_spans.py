"""Spans without vLLM: what they carry, and that a receiver that refuses or hangs costs spans and nothing else."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
from test_requests import Worker, tally

from moe_monitor.export.requests import summarise
from moe_monitor.records import RecordReader

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from moe_monitor.export import spans


@pytest.fixture
def summary(tmp_path):
    with Worker(tmp_path / "run") as worker:
        worker.writer.write([tally("a", tokens=20)])
        reader = RecordReader(tmp_path / "run")
        (record,) = reader.poll()
        reader.close()
    return summarise(record)


@pytest.fixture
def vllm():
    """vLLM's side: a provider, and a function that makes a request's span as ``do_tracing`` does."""
    provider = TracerProvider(resource=Resource.create({"service.name": "served"}), shutdown_on_exit=False)
    seen = []
    noticing = spans.Noticing(lambda request, parent: seen.append((request, parent)))
    provider.add_span_processor(noticing)

    def request(name="r", span="llm_request"):
        noticing.request = name
        provider.get_tracer("vllm").start_span(span, start_time=time.time_ns() - 10**9).end()
        noticing.request = ""
        return seen

    provider.request = request
    yield provider
    provider.shutdown()


class Exporter:
    def __init__(self, act=lambda: SpanExportResult.SUCCESS) -> None:
        self.act = act

    def export(self, batch):
        return self.act()

    def shutdown(self):
        pass

    def force_flush(self, timeout_millis=0):
        return True


def test_only_the_requests_own_span_is_noticed(vllm) -> None:
    assert vllm.request("") == []
    assert vllm.request("r", span="something else") == []
    ((request, parent),) = vllm.request("r")
    assert request == "r"
    assert parent.end - parent.start >= 10**9


@pytest.mark.parametrize("events", [False, True])
def test_a_span_stands_under_its_parent(vllm, summary, events) -> None:
    memory = InMemorySpanExporter()
    emitter = spans.Emitter(memory, vllm, events=events)
    ((_, parent),) = vllm.request()
    emitter.emit(parent, summary)
    emitter._provider.force_flush()
    (span,) = memory.get_finished_spans()
    assert (span.name, span.parent.span_id) == ("moe.routing", parent.context.span_id)
    assert span.context.trace_id == parent.context.trace_id
    assert (span.start_time, span.end_time) == (parent.start, parent.end)
    assert span.resource.attributes["service.name"] == "served"
    assert span.attributes["moe.tokens.prefill"] == 20
    assert "moe.drift.bits" not in span.attributes  # no load is known to compare with
    assert [e.attributes["moe.layer"] for e in span.events] == ([0, 1, 2, 3] if events else [])
    assert all(key.startswith("moe.") for key in span.attributes)
    assert emitter.dropped == 0
    emitter.close()


def fail():
    raise ConnectionError


@pytest.mark.parametrize("act", [lambda: SpanExportResult.FAILURE, fail])
def test_what_the_receiver_refuses_is_counted(vllm, summary, act, caplog) -> None:
    emitter = spans.Emitter(Exporter(act), vllm)
    ((_, parent),) = vllm.request()
    for _ in range(3):
        emitter.emit(parent, summary)
    emitter._provider.force_flush()
    assert emitter.dropped == 3
    emitter.close()


@contextlib.contextmanager
def machine() -> Iterator[list[float]]:
    """The longest, in seconds, that a thread took to sleep for a hundredth of one: how long the machine stood still."""
    longest, over = [0.0], threading.Event()

    def sleep() -> None:
        while not over.is_set():
            start = time.perf_counter()
            time.sleep(0.01)
            longest[0] = max(longest[0], time.perf_counter() - start)

    thread = threading.Thread(target=sleep)
    thread.start()
    try:
        yield longest
    finally:
        over.set()
        thread.join()


def test_a_receiver_that_hangs_costs_spans_only(vllm, summary) -> None:
    """10,000 requests: a bounded queue, every span that does not fit counted, and nobody waits."""
    go_on = threading.Event()
    emitter = spans.Emitter(Exporter(lambda: (go_on.wait(20), SpanExportResult.SUCCESS)[1]), vllm)
    ((_, parent),) = vllm.request()
    slowest = 0.0
    with machine() as stood_still:
        for _ in range(10_000):
            start = time.perf_counter()
            emitter.emit(parent, summary)
            slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 0.5 + stood_still[0]
    assert 10_000 - 2 * spans.QUEUE <= emitter.dropped <= 10_000 - spans.QUEUE
    start = time.perf_counter()
    threading.Timer(0.2, go_on.set).start()
    emitter.close()
    assert time.perf_counter() - start < 3
