"""Traced requests, the long test, only where its variable is set.

MOE_TEST_SOAK=10000  so many traced requests while the collector misbehaves; a short version is in test_vllm_tracing.py.
                     MOE_TEST_SOAK_OUT=FILE: where the report is written.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import moods
import pytest
from otlp import Receiver
from serving import Server

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
        report = moods.run(server, receiver, REQUESTS, least_s=15)
        log = server.log
    finally:
        server.stop()
        receiver.stop()
    setting = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "server": f"vLLM {vllm.__version__}, 4 layers, 64 experts, every request traced, 3 + 2 tokens each",
    }
    text = moods.as_markdown(report, setting)
    print(text)
    if os.environ.get("MOE_TEST_SOAK_OUT"):
        Path(os.environ["MOE_TEST_SOAK_OUT"]).write_text(text)
    moods.check(report, REQUESTS)
    assert "traces no requests any more" not in log
    later = [(api, engine) for n, api, engine in report.memory if n >= REQUESTS // 2]
    for side in zip(*later, strict=True):
        assert max(side) - side[0] < 32, side
