"""A real ``transformers serve`` process with the monitor: what it counts is what the same model counts here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("accelerate", reason="transformers serve loads models through accelerate")
pytest.importorskip("transformers.cli.serving.model_manager", reason="transformers 5.x")

import models  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from moe_monitor.capture.transformers import expert_counts  # noqa: E402
from moe_monitor.snapshot import read_engines  # noqa: E402


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def call(url: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


@pytest.mark.slow
def test_transformers_serve_is_counted_and_scraped(tmp_path) -> None:
    folder = models.olmoe(tmp_path / "model", layers=2, experts=16, top_k=4)
    boards, port, metrics = tmp_path / "run", free_port(), free_port()
    environment = os.environ | {
        "MOE_MONITOR_DIR": str(boards),
        "MOE_MONITOR_INTERVAL": "0.1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = (tmp_path / "log").open("w")
    command = [sys.executable, "-m", "moe_monitor.capture.transformers.serve", "--metrics-port", str(metrics)]
    server = subprocess.Popen(
        [*command, str(folder), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            try:
                call(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(0.5)
        prompt = "To route or not to route"
        body = {"model": str(folder), "prompt": prompt, "max_tokens": 8, "temperature": 0}
        answer = json.loads(call(f"http://127.0.0.1:{port}/v1/completions", body))
        made = answer["usage"]["completion_tokens"]
        time.sleep(0.5)
        (engine,) = read_engines(boards)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = tokenizer(prompt)["input_ids"]
        whole = model.generate(torch.tensor([ids]), max_new_tokens=made, do_sample=False)[0].tolist()
        expected = expert_counts(model, [whole[:-1]])
        assert engine.column("tokens").tolist() == [len(ids) + made - 1] * 2
        assert abs(engine.counts - expected).sum() <= 4  # decode and prefill differ in rounding; a near tie may move
        text = call(f"http://127.0.0.1:{metrics}/metrics")
        assert f'moe_routed_tokens_total{{model_name="{folder}",engine="0",layer="1"}} {len(ids) + made - 1}' in text
    finally:
        server.terminate()
        server.wait(30)
        log.close()
