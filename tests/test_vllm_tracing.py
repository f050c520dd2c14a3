"""Traced requests against a real vLLM server: what each routed, its span, and what operators see of it.

What was computed is read from vLLM's own scheduler, what each position routes from transformers in float32, and
spans arrive at a real OTLP receiver.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Oracle, entropy_ratio
from otlp import Receiver
from serving import eventually, serving
from test_vllm_exact import BATCH, Traffic, matrix

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


@pytest.fixture(scope="module")
def traced(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    tmp = tmp_path_factory.mktemp("tracing")
    schedule = tmp / "schedule.jsonl"
    schedule.touch()
    receiver = Receiver()
    arguments = ["--enforce-eager", "--max-num-batched-tokens", str(BATCH), "--max-num-seqs", "16"]
    arguments += ["--max-model-len", "512", "--block-size", "32", "--num-gpu-blocks-override", "20"]
    arguments += ["--otlp-traces-endpoint", f"http://127.0.0.1:{receiver.port}"]
    environment = {"MOE_TEST_SCHEDULE": str(schedule), "MOE_MONITOR_SAMPLE_RATIO": "1"}
    with serving(tiny_model, tmp / "server", *arguments, **environment) as server:
        made = Traced(server, schedule, Oracle(tiny_model))
        made.receiver, made.records = receiver, Records(server.run_dir)
        yield made
        made.records.stop()
    receiver.stop()


PROMPTS = (3, 40, 64, 65, 130, 300, 17, 90, 210, 33, 150, 5)


def test_each_request_gets_what_it_routed(traced: Traced) -> None:
    """Chunked prefill, prefix hits, preemption, aborts and n > 1; and all requests together are the counters."""
    lengths: dict[str, int] = {}

    def send(prompt: list[int], **options: Any) -> None:
        traced.send(prompt, **options)

    shared = traced.prompt(70)
    send(shared, max_tokens=8)
    send([*shared, *traced.prompt(20)], max_tokens=8)
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
    assert sorted(lengths.values()) == sorted([70, 90, *PROMPTS, 25, 25, 25, 50, 50, 50, 50])
    total = sum(record.counts.sum(1) for record in records.found)
    assert np.array_equal(total, matrix(traced.server))
