"""The whole chain in real parts: a vLLM server under load, Prometheus with the shipped rules, Alertmanager, a receiver.

Faults are planted in the server: one layer's experts become slow, then every router becomes sure of one expert. Only
times are shortened: a second for every minute of the rules.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import queries
import stack
from serving import Server, eventually, only, serving

from moe_monitor.cli.main import main

pytestmark = pytest.mark.vllm

#: What has no data here, and why; nothing else may be empty.
NO_RANKS = "one rank, no expert parallelism"
WELL = "nothing of the kind happened"
WITHOUT_DATA = {
    r"server_layer_rank:.*|server_rank:.*|server:moe_ep_.*|engine:moe_ep_.*|engine_rank:.*": NO_RANKS,
    r"MoeEpRankStraggling|MoeEpRankSlow": NO_RANKS,
    r"moe-monitor-ranks: .*": NO_RANKS,
    r"moe-monitor-latency: (Longest wait of a rank|Wait of each expert-parallel rank.*) A": NO_RANKS,
    r"moe-monitor-overview: Engines, worst drift first F": NO_RANKS,
    r"engine_batch:moe_layer_duration_seconds:over_past": "asks for half an hour ago; above it is waited for, hastened",
    r"MoeMonitorAbsent": WELL,
    r"MoeMonitorErrors|moe-monitor-self: Errors since start, by place A": WELL,
    r"MoeMonitorDropping": "bad_moe_trace alone is no alert",
}

#: What may have none: at the size of batches of that moment there may be no past. The alert on it has been received.
SOMETIMES = (
    r"MoeLayerLatencyRegressed|moe-monitor-latency: Engines, slowest of their past first A"
    r"|moe-monitor-overview: Engines, worst drift first G"
)


class Load:
    """A client that sends prompts of all lengths until stopped, or for seven minutes.

    One alone: a decode step then has one token however slow the server is, so layer times have a comparable past.
    """

    def __init__(self, server: Server) -> None:
        self.server, self.stopped, self.sent = server, threading.Event(), 0
        self.until, self.pause = (
            time.monotonic() + 420,
            0.05,
        )  # Prometheus and its rules share two cores with the server
        self.threads = [threading.Thread(target=self._run, args=(i,)) for i in range(1)]

    def _run(self, client: int) -> None:
        draw = random.Random(client)
        while not self.stopped.is_set() and time.monotonic() < self.until:
            prompt = [draw.randrange(3, 300) for _ in range(draw.choice((4, 20, 60, 150)))]
            self.server.complete(prompt, f"{client}-{self.sent}", max_tokens=draw.choice((4, 16, 40)))
            self.sent += 1
            self.stopped.wait(self.pause)

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[stack.Processes]:
    made = stack.Processes(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def receiver() -> Iterator[stack.Receiver]:
    made = stack.Receiver()
    yield made
    made.stop()


@pytest.mark.timeout(600)
def test_a_broken_router_in_a_real_server_reaches_the_receiver(
    tiny_model: Path, tmp_path: Path, processes: stack.Processes, receiver: stack.Receiver
) -> None:
    normal, slow_layer, fault = (tmp_path / name for name in ("normal.json", "slow", "fault"))
    settings = {"MOE_MONITOR_BASELINE": str(normal), "MOE_MONITOR_SAMPLE_RATIO": "1"}
    settings |= {"MOE_MONITOR_LATENCY_EVERY": "10", "MOE_TEST_ROUTER_BIAS": str(fault)}
    settings |= {"MOE_TEST_SLOW": f"2:30:{slow_layer}"}
    arguments = ["--enforce-eager", "--max-model-len", "512", "--no-enable-prefix-caching"]
    with serving(tiny_model, tmp_path / "server", *arguments, **settings) as server, Load(server) as load:
        record = ["baseline", "record", str(normal), "--dir", str(server.run_dir), "--window", "1.5", "--duration", "9"]
        eventually(lambda: load.sent > 10, 60)
        assert main(record) == 0
        server.complete([5, 6, 7], "bad", max_tokens=2, vllm_xargs={"moe_trace": 7})
        eventually(lambda: only(server.metrics(), "moe_baseline_usable", engine="0") == 1, 15)

        prometheus = stack.start(tmp_path, processes, f"127.0.0.1:{server.port}", receiver)
        eventually(lambda: prometheus.value("engine:moe_routing_drift:excess5m") is not None, 90)
        # Healthy until there is enough of a past to compare layer times with.
        end = time.monotonic() + 150
        while prometheus.value("engine_batch:moe_layer_duration_seconds:over_past") is None:
            assert prometheus.firing() == set()
            assert time.monotonic() < end
            time.sleep(1)
        assert prometheus.firing() == set()

        slow_layer.touch()
        eventually(lambda: "MoeLayerLatencyRegressed" in receiver.by_name(), 90)
        slow_layer.unlink()
        slowed = receiver.by_name()["MoeLayerLatencyRegressed"]["annotations"]
        assert re.search(r"Worst: layer 2 in (decode|prefill): [\d.]+ms;", slowed["description"]), slowed
        assert {"MoeRouterCollapse", "MoeLoadImbalance"} & set(receiver.by_name()) == set()

        planted = time.monotonic()
        fault.touch()
        eventually(lambda: "MoeRouterCollapse" in receiver.by_name(), 60)
        print(f"{time.monotonic() - planted:.1f} s from the fault in the server to the receiver; {load.sent} requests")
        alert = receiver.by_name()["MoeRouterCollapse"]
        assert alert["labels"] | {"model_name": "tiny", "engine": "0", "severity": "critical"} == alert["labels"]
        assert (
            f"The router of tiny engine 0 on 127.0.0.1:{server.port} has collapsed" == alert["annotations"]["summary"]
        )
        assert re.search(r"In \d of its layers .* Worst: layer \d: 0\.\d\d;", alert["annotations"]["description"])
        assert {"MoeMonitorDropping", "MoeMonitorErrors", "MoeRouterNonFinite"} & set(receiver.by_name()) == set()

        live = {name for name, _ in server.metrics()}
        assert live >= queries.VLLM, "queries name metrics that this vLLM does not have"
        load.pause = 0.1  # Prometheus is timed, not the contention for this machine
        slow, empty = queries.check(prometheus, queries.expressions(), layer="1")
        print(f"{len(queries.expressions())} queries, {len(empty)} without data")

        # What a moment's traffic did not have, steps of one kind perhaps, comes; what never does is a fault.
        def unexpected() -> set[str]:
            known = [*WITHOUT_DATA, SOMETIMES]
            return {where for where in empty if not any(re.fullmatch(pattern, where) for pattern in known)}

        end = time.monotonic() + 60
        while unexpected() and time.monotonic() < end:
            again = [e for e in queries.expressions() if e.where in unexpected()]
            empty -= {e.where for e in again} - queries.check(prometheus, again, layer="1")[1]
        assert unexpected() == set()
        assert slow == {}
        for pattern in WITHOUT_DATA:  # what has data after all has no place in the list
            assert any(re.fullmatch(pattern, where) for where in empty), pattern
