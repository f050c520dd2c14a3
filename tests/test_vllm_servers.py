"""Servers of other shapes: several API servers, tensor parallelism, bad settings."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from oracle import Oracle
from serving import eventually, only, select, serving

from moe_monitor import expert_counts

pytestmark = pytest.mark.vllm


def leave_a_dead_board(directory: Path) -> Path:
    """What a worker that was killed leaves behind."""
    script = (
        "import os, signal, sys; from pathlib import Path; from boards import FakeWorker\n"
        "FakeWorker(Path(sys.argv[1]), name='dead', tokens=5000, model_name='tiny', server='gone')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(directory)], cwd=Path(__file__).parent, check=False)
    (board,) = directory.glob("*.board")
    return board


def test_two_api_servers_and_two_tensor_parallel_ranks_count_once(tiny_model: Path, tmp_path: Path) -> None:
    """Both API servers tell the same whole story, and the two ranks' identical routing is counted once."""
    arguments = ["--enforce-eager", "--tensor-parallel-size", "2", "--api-server-count", "2", "--max-model-len", "512"]
    parallel = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "MOE_TEST_FRAMES": str(tmp_path / "frames"),
    }
    oracle = Oracle(tiny_model)
    (tmp_path / "server").mkdir()
    stale = leave_a_dead_board(tmp_path / "server" / "run")
    with serving(tiny_model, tmp_path / "server", *arguments, **parallel) as server:
        assert not stale.exists(), "the numbers of a run that is over stay around"
        assert set(select(server.metrics(), "moe_routed_tokens_total").values()) == {0}
        prompts = [[3 + (7 * i + j) % 290 for j in range(20 + i)] for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            traced = {"vllm_xargs": {"moe_trace": 1}}
            answers = list(pool.map(lambda p: server.complete(p, f"r{len(p)}", **traced), prompts))
        counts = np.zeros((4, 64), dtype=np.int64)
        for prompt, answer in zip(prompts, answers, strict=True):
            counts += oracle.counts(oracle.routing(prompt + answer["choices"][0]["token_ids"]).ids[:-1])
        tokens = int(counts[0].sum()) // 8
        eventually(lambda: only(server.metrics(), "moe_routed_tokens_total", layer="3") == tokens, 3)
        for _ in range(8):  # whichever of the two answers
            samples = server.metrics()
            assert only(samples, "moe_monitor_active", engine="0") == 1
            got = np.zeros_like(counts)
            for labels, value in select(samples, "moe_expert_tokens_total").items():
                found = dict(labels)
                got[int(found["layer"]), int(found["expert"])] = value
            assert np.abs(got - counts).sum() <= 2 * oracle.ties
            # each API server counted the requests that it answered, and shows the sum
            eventually(lambda: select(server.metrics(), "moe_request_e2e_seconds_count"), 10)
            eventually(lambda: only(server.metrics(), "moe_request_entropy_ratio_count") == 8, 10)
        assert only(samples, "moe_monitor_sampled_requests_total") == 8
        # The monitor of the other framework, on the same sequences: what was computed is all but the last token.
        sequences = [p + a["choices"][0]["token_ids"][:-1] for p, a in zip(prompts, answers, strict=True)]
        assert np.abs(expert_counts(oracle.model, sequences) - got).sum() <= 2 * oracle.ties
        frames = sorted(
            (name, int(most) > 10_000) for name, most in map(str.split, (tmp_path / "frames").read_text().splitlines())
        )
        assert frames == [("execute_model", True)] * 2 + [("schedule", True)], "loops that run the model have no room"
        assert server.log.count("moe-monitor 0.") == 1, "only the first rank counts"
    assert list((tmp_path / "server" / "run").glob("*.board")) == [], "SIGTERM leaves no file"


def test_a_bad_setting_is_named_and_the_server_serves(tiny_model: Path, tmp_path: Path) -> None:
    with serving(tiny_model, tmp_path / "server", "--enforce-eager", MOE_MONITOR_INTERVAL="abc") as server:
        answer = server.complete([5, 6, 7], "r1", max_tokens=3)
        assert len(answer["choices"][0]["token_ids"]) == 3
        assert server.log.count("MOE_MONITOR_INTERVAL='abc' is not allowed; it takes 0.05 to 60 seconds") == 1
        samples = server.metrics()
        assert only(samples, "moe_monitor_active", model_name="tiny", engine="0") == 0
        assert not select(samples, "moe_routed_tokens_total")
