"""A planted fault, from the board to a receiver: real exporter, Prometheus with the shipped rules, Alertmanager.

Only times are shortened: a second for every minute.
"""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import promtool  # noqa: F401  (fails early where Prometheus is not installed)
import published
import pytest
import queries
import stack
from boards import FakeWorker
from serving import eventually, free_port

from moe_monitor.cli.main import main

ROOT = Path(__file__).resolve().parent.parent

#: What only traced requests, timed steps or vLLM itself bring; test_stack_vllm.py has those.
ELSEWHERE = re.compile(
    r"moe_request_|moe_monitor_sampled_requests_total|vllm[:_]|moe_step_|moe_layer_|moe_imbalance_cost|"
    r"moe_ep_straggler|moe_ep_rank_experts"
)


@pytest.fixture
def processes(tmp_path):
    made = stack.Processes(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def receiver():
    made = stack.Receiver()
    yield made
    made.stop()


@pytest.mark.slow
def test_a_broken_router_reaches_the_receiver(tmp_path, processes, receiver, capsys):
    run, normal = tmp_path / "run", tmp_path / "normal.json"
    exported = f"127.0.0.1:{free_port()}"
    # Two expert-parallel ranks of one engine: the second counts nothing, as ranks that would repeat another's do.
    halves = [{"rank": r, "experts": list(range(r * 32, r * 32 + 32))} for r in range(2)]
    second = FakeWorker(run, "rank-1", model_name="olmoe", layers=(), ep=halves[1])
    with second, published.Traffic(run, "c4", ep=halves[0]) as traffic:
        keep = threading.Event()
        beat = threading.Thread(target=lambda: [second.status(second.now) for _ in iter(lambda: keep.wait(0.5), True)])
        beat.start()
        try:
            record = ["baseline", "record", str(normal), "--dir", str(run), "--window", "0.5", "--duration", "3"]
            assert main(record) == 0
            capsys.readouterr()
            clean = {k: v for k, v in os.environ.items() if not k.startswith("MOE_MONITOR_")}
            exporter = [sys.executable, "-m", "moe_monitor.cli.main", "export", "--dir", str(run)]
            exporter += ["--port", exported.rsplit(":", 1)[1]]
            processes.start("exporter", exporter, env=clean | {"MOE_MONITOR_BASELINE": str(normal)}, cwd=ROOT)
            server = stack.start(tmp_path, processes, exported, receiver)

            # Healthy: the limits are there, and nothing fires for longer than any `for`.
            eventually(lambda: server.value("engine:moe_routing_drift:excess5m") is not None, 30)
            eventually(lambda: server.value("engine:moe_router_entropy:min5m") is not None, 30)
            end = time.monotonic() + 8
            while time.monotonic() < end:
                assert server.firing() == set()
                time.sleep(1)
            assert server.value("engine:moe_routing_drift:excess5m") < 1

            planted = time.monotonic()
            traffic.p, traffic.entropy, traffic.mass = published.collapsed(traffic.p), 0.05, 0.99
            traffic.worker.now.errors["publish"] = 1
            traffic.worker.now.dropped["request"] = 3

            received = receiver.by_name
            eventually(lambda: {"MoeRouterCollapse", "MoeRoutingDrift"} <= set(received()), 60)
            print(f"{time.monotonic() - planted:.1f} s from the fault to the receiver")
            alert = received()["MoeRouterCollapse"]
            assert alert["labels"] | {"model_name": "olmoe", "severity": "critical"} == alert["labels"]
            assert "The router of olmoe engine 0 on 127.0.0.1" in alert["annotations"]["summary"]
            assert re.search(r"In 3 of its layers .* Worst: layer \d+: 0\.\d\d;", alert["annotations"]["description"])
            assert alert["annotations"]["runbook_url"].endswith("MoeRouterCollapse.md")
            assert "MoeExpertSilent" not in received()

            eventually(lambda: server.value("moe_monitor_dropped_total") is not None, 10)
            slow, empty = queries.check(server, [e for e in queries.expressions() if not ELSEWHERE.search(e.text)])
            assert slow == {}
            assert empty == set()
            check_preview(server, tmp_path / "previews")
        finally:
            keep.set()
            beat.join()


def check_preview(server, out):
    """The preview tool draws from these answers."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "grafana" / "preview.py"), "--url", server.url, "--out", str(out)]
    command += ["--dashboard", "moe-monitor-overview", "--dashboard", "moe-monitor-layers", "--hours", "0.02"]
    done = subprocess.run([*command, "--var", "layer=7"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "moe-monitor-layers: every panel has data" in done.stdout
    assert "moe-monitor-overview: without data: Layer time, of its past\n" in done.stdout  # nothing is timed here
    for name in ("overview", "layers"):
        assert (out / f"moe-monitor-{name}.png").read_bytes().startswith(b"\x89PNG")
