"""Workers that are actors of a real Ray, opt-in: `pip install ray`, then

    MOE_TEST_RAY=1 python -m pytest tests/test_vllm_ray.py

vLLM has no Ray on its CPU platform; the test says that it has (``tests/injected``), and all else is as on GPUs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import matrix
from oracle import Oracle
from serving import environment, eventually, free_port, only, select, serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ARGUMENTS = ["--enforce-eager", "--max-model-len", "512", "--no-enable-prefix-caching", "--tensor-parallel-size", "2"]


@contextlib.contextmanager
def cluster(tmp: Path) -> Iterator[dict[str, str]]:
    """Two devices on this machine; what a server needs to find it. It has been started by another server, with other
    settings.
    """
    port = free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port)]
    command += ["--num-gpus", "2", "--num-cpus", "4", "--include-dashboard", "false", "--disable-usage-stats"]
    own = {"MOE_TEST_RAY": "1", "RAY_AUTH_MODE": "disabled"}
    other = {"_MOE_MONITOR_SERVER": "another", "MOE_MONITOR_SAMPLE_RATIO": "0"}
    env = environment(tmp / "another", **own, **other)
    with (tmp / "ray.log").open("w") as file:
        ray = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
    try:
        eventually(lambda: "Ray runtime started" in (tmp / "ray.log").read_text(), 120)
        yield own | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        ray.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            ray.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ray.pid, signal.SIGKILL)
        ray.wait(20)


@pytest.mark.skipif(not os.environ.get("MOE_TEST_RAY"), reason="opt-in: MOE_TEST_RAY=1, with Ray installed")
@pytest.mark.parametrize("version", ["1", "0"], ids=["executor v2", "executor v1"])
def test_actors_show_in_their_servers_metrics(tiny_model: Path, tmp_path: Path, version: str) -> None:
    oracle, counts = Oracle(tiny_model), np.zeros((4, 64), dtype=np.int64)
    with cluster(tmp_path) as ray:
        ray |= {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": version, "OMP_NUM_THREADS": "1"}
        ray |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "MOE_MONITOR_SAMPLE_RATIO": "1"}
        arguments = [*ARGUMENTS, "--distributed-executor-backend", "ray"]
        with serving(tiny_model, tmp_path / "server", *arguments, **ray) as server:
            for i in range(4):
                prompt = [3 + (7 * i + j) % 290 for j in range(5 + 30 * i)]
                tokens = server.complete(prompt, f"r{i}")["choices"][0]["token_ids"]
                counts += oracle.counts(oracle.routing(prompt + tokens).ids[:-1])

            def settled() -> Any:
                samples = server.metrics()
                told = select(samples, "moe_request_entropy_ratio_count").values()
                routed = select(samples, "moe_routed_tokens_total", layer="3").values()
                return samples if ([*told], [*routed]) == ([4], [counts[0].sum() // 8]) else None

            samples = eventually(settled, 15)
            assert only(samples, "moe_monitor_active", model_name="tiny", engine="0") == 1
            assert np.abs(matrix(samples, oracle) - counts).sum() <= 2 * oracle.ties
            assert len(list(server.run_dir.glob("*.board"))) == 3, "two ranks, one front end"
