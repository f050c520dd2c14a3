"""Traced requests, the long tests, each only where its variable is set.

MOE_TEST_SOAK=10000  so many traced requests while the collector misbehaves; a short version is in test_vllm_tracing.py.
                     MOE_TEST_SOAK_OUT=FILE: where the report is written.
MOE_TEST_PIPELINE=1  a server with two pipeline stages.
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soak
from oracle import Oracle
from otlp import Receiver
from serving import Server, eventually, only

from moe_monitor.records import RecordReader
from moe_monitor.snapshot import read_engines

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

REQUESTS = int(os.environ.get("MOE_TEST_SOAK", "0"))


@pytest.mark.timeout(1800)
@pytest.mark.skipif(not REQUESTS, reason="opt-in: MOE_TEST_SOAK=10000")
def test_a_bad_collector_costs_spans_and_nothing_else(tiny_model: Path, tmp_path: Path) -> None:
    import vllm

    receiver = Receiver()
    arguments = ["--enforce-eager", "--max-num-seqs", "16", "--max-model-len", "512", "--no-enable-prefix-caching"]
    arguments += ["--otlp-traces-endpoint", f"http://127.0.0.1:{receiver.port}", "--disable-uvicorn-access-log"]
    server = Server(tiny_model, tmp_path / "log", tmp_path / "run", *arguments, MOE_MONITOR_SAMPLE_RATIO="1")
    try:
        server.wait(600)
        report = soak.run(server, receiver, REQUESTS, least_s=15)
        log = server.log
    finally:
        server.stop()
        receiver.stop()
    setting = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "server": f"vLLM {vllm.__version__}, 4 layers, 64 experts, every request traced, 3 + 2 tokens each",
    }
    text = soak.as_markdown(report, setting)
    print(text)
    if os.environ.get("MOE_TEST_SOAK_OUT"):
        Path(os.environ["MOE_TEST_SOAK_OUT"]).write_text(text)
    soak.check(report, REQUESTS)
    assert "traces no requests any more" not in log
    later = [(api, engine) for n, api, engine in report.memory if n >= REQUESTS // 2]
    for side in zip(*later, strict=True):
        assert max(side) - side[0] < 32, side


@pytest.mark.timeout(1200)
@pytest.mark.skipif(not os.environ.get("MOE_TEST_PIPELINE"), reason="opt-in: MOE_TEST_PIPELINE=1")
def test_pipeline_stages_tell_of_one_request_together(tiny_model: Path, tmp_path: Path) -> None:
    """Each stage tallies its own layers; record, counters and terminal have them all, against transformers."""
    arguments = ["--enforce-eager", "--pipeline-parallel-size", "2", "--max-model-len", "512"]
    parallel = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "MOE_MONITOR_SAMPLE_RATIO": "1"}
    oracle = Oracle(tiny_model)
    server = Server(tiny_model, tmp_path / "log", tmp_path / "run", *arguments, **parallel)
    try:
        server.wait(600)
        prompts = [[3 + (11 * i + j) % 290 for j in range(9 + 13 * i)] for i in range(8)]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda p: server.complete(p, f"r{len(p)}"), prompts))
        reader, records = RecordReader(server.run_dir), []
        eventually(lambda: records.extend(reader.poll()) or len(records) == len(prompts), 10)
        told = {r.meta.id.rsplit("-", 1)[0]: r for r in records}
        total = np.zeros((4, 64), dtype=np.int64)
        for prompt, answer in zip(prompts, answers, strict=True):
            record = told[f"cmpl-r{len(prompt)}-0"]
            assert record.layers == (0, 1, 2, 3)
            wanted = oracle.counts(oracle.routing(prompt + answer["choices"][0]["token_ids"]).ids[:-1])
            assert np.abs(record.counts.sum(1) - wanted).sum() <= 2 * oracle.ties
            total += record.counts.sum(1)
        (engine,) = read_engines(server.run_dir)
        assert len(engine.identities) == 2
        assert np.array_equal(engine.counts, total)
        samples = server.metrics()
        assert only(samples, "moe_request_entropy_ratio_count") == len(prompts)
        assert only(samples, "moe_monitor_sampled_requests_total") == len(prompts)
    finally:
        server.stop()
