"""Exactness against a real vLLM server: every routed token of every real step, counted once.

What was computed is read from vLLM's own scheduler, what each position routes from transformers in float32.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Oracle, entropy_ratio
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from serving import Server, eventually, only, parse, select, serving

pytestmark = pytest.mark.vllm

BATCH = 64  # tokens a step: longer prompts are prefilled in chunks
SLOW_LAYER, SLOW_MS = 2, 5  # planted on demand


class Traffic:
    """One server, everything that was sent to it, and what it must therefore have routed."""

    def __init__(self, server: Server, schedule: Path, oracle: Oracle) -> None:
        self.server = server
        self.schedule = schedule
        self.oracle = oracle
        self.sequences: dict[str, list[int]] = {}
        self._random = random.Random(7)
        self._lock = threading.Lock()
        self._serial = 0

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(3, 300) for _ in range(length)]

    def send(self, prompt: list[int], **options: Any) -> list[list[int]]:
        """One request; remembers prompt plus output of each of its sequences, by the id the engine gives it."""
        with self._lock:
            self._serial += 1
            name = f"r{self._serial}"
        choices = self.server.complete(prompt, name, **options)["choices"]
        outputs = [c["token_ids"] for c in sorted(choices, key=lambda c: c["index"])]
        for index, output in enumerate(outputs):
            self.sequences[f"{index}_cmpl-{name}-0" if len(outputs) > 1 else f"cmpl-{name}-0"] = prompt + output
        return outputs

    def abort(self, prompt: list[int], after: int) -> None:
        """A streaming request whose client goes away after a few tokens."""
        with self._lock:
            self._serial += 1
            name = f"r{self._serial}"
        # Greedy decoding is deterministic: the same request, not aborted, tells how the sequence went on.
        (full,) = self.send(prompt, max_tokens=200)
        self.sequences[f"cmpl-{name}-0"] = prompt + full
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": 200,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.server.port}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", "x-request-id": name},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            for _ in range(2 * after):
                response.readline()

    def settled(self) -> dict[str, Any]:
        """The scheduler's account once the engine is idle."""
        last = -1
        while (size := self.schedule.stat().st_size) != last:
            last = size
            time.sleep(0.4)
        steps = [json.loads(line) for line in self.schedule.read_text().splitlines()]
        return {
            "steps": [s["step"] for s in steps if s["step"]],
            "preempted": [p for s in steps for p in s["preempted"]],
        }

    def expected(self, steps: list[list[Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Counts [layers, experts] and the float64 entropy ratios [tokens, layers] of all computed positions."""
        counts, entropies = np.zeros((self.oracle.layers, self.oracle.experts), dtype=np.int64), []
        for step in steps:
            for request, start, n in step:
                engine_id = request.rsplit("-", 1)[0]  # vLLM appends a random suffix
                routing = self.oracle.routing(self.sequences[engine_id])
                counts += self.oracle.counts(routing.ids[start : start + n])
                entropies.append(entropy_ratio(routing.logits[start : start + n]))
        return counts, np.concatenate(entropies)


@pytest.fixture(scope="module")
def traffic(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traffic]:
    tmp = tmp_path_factory.mktemp("exact")
    schedule = tmp / "schedule.jsonl"
    schedule.touch()
    arguments = ["--enforce-eager", "--max-num-batched-tokens", str(BATCH), "--max-num-seqs", "16"]
    arguments += ["--max-model-len", "512", "--block-size", "32", "--num-gpu-blocks-override", "20"]
    fault = ",".join(f"{where}:{tmp / where}" for where in ("collect", "record", "latency"))
    environment = {"MOE_TEST_SCHEDULE": str(schedule), "MOE_TEST_FAULT": fault, "MOE_MONITOR_LOG_INTERVAL": "1"}
    # Passes are timed ten times as often as by default, while all that follows must stay exact.
    environment |= {"MOE_MONITOR_LATENCY_EVERY": "20", "MOE_TEST_SLOW": f"{SLOW_LAYER}:{SLOW_MS}:{tmp / 'slow'}"}
    with serving(tiny_model, tmp / "server", *arguments, **environment) as server:
        yield Traffic(server, schedule, Oracle(tiny_model))


def matrix(server: Server) -> np.ndarray:
    samples = server.metrics()
    layers = {int(dict(k)["layer"]) for k in select(samples, "moe_expert_tokens_total")}
    counts = np.zeros((len(layers), 64), dtype=np.int64)
    for labels, value in select(samples, "moe_expert_tokens_total").items():
        found = dict(labels)
        counts[int(found["layer"]), int(found["expert"])] = value
    return counts


def test_nothing_is_counted_before_the_first_request(traffic: Traffic) -> None:
    samples = traffic.server.metrics()
    assert only(samples, "moe_monitor_active", model_name="tiny", engine="0") == 1
    assert set(select(samples, "moe_routed_tokens_total").values()) == {0}
    assert traffic.settled()["steps"] == []


def test_a_burst_shows_within_two_seconds(traffic: Traffic) -> None:
    """And then nothing moves on an idle server; counters never go back while it happens."""
    seen: list[float] = []
    traffic.send(traffic.prompt(10), max_tokens=5)
    done = time.monotonic()
    while time.monotonic() < done + 2:
        seen.append(only(traffic.server.metrics(), "moe_routed_tokens_total", layer="0"))
        time.sleep(0.1)
    assert seen == sorted(seen)
    assert seen[-1] == 10 + 5 - 1  # the last token is sampled, not computed


def test_every_token_is_counted_once(traffic: Traffic) -> None:
    """Concurrency, chunked prefill, prompts beyond the batch budget, prefix hits, preemption, aborts and n > 1."""
    shared = traffic.prompt(70)
    traffic.send(shared, max_tokens=8)
    traffic.send([*shared, *traffic.prompt(20)], max_tokens=8)  # two blocks of 32 come from the prefix cache
    bursts = 0
    while bursts < 4 and not (bursts and traffic.settled()["preempted"]):  # how they meet is chance
        bursts += 1
        prompts = [traffic.prompt(n) for n in (3, 40, 64, 65, 130, 300, 17, 90, 210, 33, 150, 5)]
        with ThreadPoolExecutor(12) as pool:
            running = [pool.submit(traffic.send, p, max_tokens=120) for p in prompts]
            while not all(r.done() for r in running):  # a reading never falls into the middle of a step
                readings = select(traffic.server.metrics(), "moe_routed_tokens_total").values()
                assert len(set(readings)) == 1
                time.sleep(0.05)
            for r in running:
                r.result()
    # (all three fit into a step: vLLM 0.32's CPU build dies of a seed where a prompt is split)
    traffic.send(traffic.prompt(BATCH // 3), n=3, temperature=1.0, seed=1, max_tokens=30)
    for after in (1, 9):
        traffic.abort(traffic.prompt(50), after)

    account = traffic.settled()
    steps = account["steps"]
    assert max(sum(n for _, _, n in step) for step in steps) == BATCH, "no step was full: nothing was chunked"
    assert account["preempted"], "nothing was preempted: the KV cache is too large for this test"
    samples = eventually(
        lambda: (s := traffic.server.metrics()) and only(s, "moe_forward_passes_total") == len(steps) and s,
        seconds=3,
    )
    hits = only(samples, "vllm:prefix_cache_hits_total")
    assert hits >= 64, "no prefix cache hit"
    counts, entropy = traffic.expected(steps)
    computed = sum(n for step in steps for _, _, n in step)
    assert set(select(samples, "moe_routed_tokens_total").values()) == {computed}
    difference = np.abs(matrix(traffic.server) - counts).sum()
    # A tie may move one token from one expert to another: two counts. The seeds are such that there are next to none in
    # a burst (one of 20,000 decisions of this model is one), and how many bursts there are is chance.
    assert traffic.oracle.ties <= 2 * bursts, bursts
    assert difference <= 2 * traffic.oracle.ties
    for layer in range(traffic.oracle.layers):
        labels = {"layer": str(layer)}
        assert only(samples, "moe_router_entropy_ratio_count", **labels) == computed
        mean = only(samples, "moe_router_entropy_ratio_sum", **labels) / computed
        assert mean == pytest.approx(entropy[:, layer].mean(), abs=1e-3)
        bounds = {dict(k)["le"]: v for k, v in select(samples, "moe_router_entropy_ratio_bucket", **labels).items()}
        for bound, value in bounds.items():
            # A value within 1e-5 of a bound may fall on either side of it in float32.
            edge = float(bound)
            assert (entropy[:, layer] <= edge - 1e-5).sum() <= value <= (entropy[:, layer] <= edge + 1e-5).sum()
        assert only(samples, "moe_experts_per_token_sum", **labels) == 8 * computed
    active = [
        len(
            {
                e
                for r, s, n in step
                for e in traffic.oracle.routing(traffic.sequences[r.rsplit("-", 1)[0]]).ids[s : s + n, 0].ravel()
            }
        )
        for step in steps
    ]
    assert abs(only(samples, "moe_active_experts_sum", layer="0") - sum(active)) <= traffic.oracle.ties


def test_flops_follow_the_shape(traffic: Traffic) -> None:
    """By hand for this model: gate 2*64*64 a token; SwiGLU expert 2*3*64*32 a routed token; 4 layers."""
    samples = traffic.server.metrics()
    tokens = only(samples, "moe_routed_tokens_total", layer="0")
    assert only(samples, "moe_flops_total", component="router") == tokens * 4 * 8192
    assert only(samples, "moe_flops_total", component="experts") == tokens * 8 * 4 * 12288


def test_windows_agree_with_the_counts(traffic: Traffic) -> None:
    """The server is younger than five minutes, so its 5 m window holds everything."""
    samples, counts = traffic.server.metrics(), matrix(traffic.server)
    for layer, row in enumerate(counts):
        labels = {"layer": str(layer), "window": "5m"}
        assert only(samples, "moe_load_imbalance_ratio", **labels) == pytest.approx(row.max() / row.mean())
        assert only(samples, "moe_idle_experts", **labels) == (row == 0).sum()
        assert 1 < only(samples, "moe_load_imbalance_floor_ratio", **labels) < row.max() / row.mean()


def test_metrics_are_served_as_asked_for(traffic: Traffic) -> None:
    server = traffic.server
    plain, headers = server.get("/metrics")
    assert headers["content-type"].startswith("text/plain")
    packed, headers = server.get("/metrics", {"accept-encoding": "gzip"})
    assert headers["content-encoding"] == "gzip"
    names = {k[0] for k in parse(gzip.decompress(packed).decode())}
    assert names == {k[0] for k in parse(plain.decode())}
    assert {"vllm:num_requests_running", "moe_expert_tokens_total", "moe_monitor_active"} <= names
    text, headers = server.get("/metrics", {"accept": "application/openmetrics-text; version=1.0.0"})
    if "openmetrics" in headers["content-type"]:
        assert "moe_expert_tokens" in {f.name for f in parse_openmetrics(text.decode())}
    assert only(parse(plain.decode()), "moe_monitor_info", capture="op", experts="64", top_k="8", layers="4") == 1


def test_a_summary_line_is_logged(traffic: Traffic) -> None:
    traffic.send(traffic.prompt(10), max_tokens=5)
    assert eventually(lambda: "MoE routing:" in traffic.server.log, 3)


def stage_means(traffic: Traffic, load: Callable[[], object]) -> dict[tuple[str, str], float]:
    """Mean seconds by (layer, stage) of decode passes that ``load`` brings; at least four of them."""
    sums, counts = "moe_layer_duration_seconds_sum", "moe_layer_duration_seconds_count"

    def read() -> dict[tuple[str, str], tuple[float, float]]:
        time.sleep(1.2)  # more than two publishing intervals
        samples = traffic.server.metrics()
        n = {
            tuple(dict(k)[x] for x in ("layer", "stage")): v for k, v in select(samples, counts, kind="decode").items()
        }
        s = {tuple(dict(k)[x] for x in ("layer", "stage")): v for k, v in select(samples, sums, kind="decode").items()}
        return {key: (n[key], s[key]) for key in n}  # type: ignore[misc]  # pairs of strings

    before = read()
    load()
    after = read()
    delta = {key: np.subtract(after[key], before.get(key, (0, 0))) for key in after}
    assert min(n for n, _ in delta.values()) >= 4
    return {key: float(seconds / n) for key, (n, seconds) in delta.items()}


def test_sampled_passes_are_timed_layer_by_layer(traffic: Traffic) -> None:
    """One in twenty; layers lie within their pass, stages within their layer, batch sizes are the scheduler's."""
    traffic.send(traffic.prompt(10), max_tokens=120)
    time.sleep(1.2)
    samples = traffic.server.metrics()
    steps = traffic.settled()["steps"]
    timed = sum(select(samples, "moe_step_duration_seconds_count").values())
    assert 0.6 < timed / (len(steps) / 20) < 1.6
    assert sum(select(samples, "moe_step_tokens_count").values()) == timed
    layers = sum(select(samples, "moe_layer_duration_seconds_sum", stage="layer").values())
    assert layers == pytest.approx(sum(select(samples, "moe_step_moe_seconds_total").values()))
    assert 0 < layers < sum(select(samples, "moe_step_timed_seconds_total").values())
    for layer in "0123":
        parts = [
            sum(select(samples, "moe_layer_duration_seconds_sum", stage=s, layer=layer).values())
            for s in ("router", "experts", "layer")
        ]
        assert parts[0] > 0 and parts[1] > 0
        assert parts[0] + parts[1] == pytest.approx(parts[2], rel=1e-6)
    # every token of a sampled pass has eight experts: 2*3*64*32 operations each
    tokens = sum(select(samples, "moe_step_tokens_sum").values())
    flops = sum(select(samples, "moe_layer_sampled_flops_total", layer="0").values())
    assert flops == tokens * 8 * 12288
    assert not select(samples, "moe_monitor_errors_total", where="latency")


def test_a_slow_layer_shows_in_its_experts_and_nowhere_else(traffic: Traffic) -> None:
    plant, prompt = traffic.schedule.parent / "slow", traffic.prompt(10)
    outputs = []
    load = lambda: outputs.append(traffic.send(prompt, max_tokens=110))  # noqa: E731
    plain = stage_means(traffic, load)
    plant.touch()
    try:
        slow = stage_means(traffic, load)
    finally:
        plant.unlink()
    change = {key: 1000 * (slow[key] - plain[key]) for key in slow}
    planted = change.pop((str(SLOW_LAYER), "experts"))
    assert planted == pytest.approx(SLOW_MS, abs=1.5)
    assert change.pop((str(SLOW_LAYER), "layer")) == pytest.approx(planted, abs=1)
    assert max(change.values()) < SLOW_MS / 3, change
    assert outputs[0] == outputs[1]


def test_a_failing_clock_switches_timing_off_and_nothing_else(traffic: Traffic) -> None:
    prompt = traffic.prompt(12)
    before = traffic.send(prompt, max_tokens=60)
    plant = traffic.schedule.parent / "latency"
    plant.touch()
    assert traffic.send(prompt, max_tokens=60) == before
    samples = eventually(
        lambda: (s := traffic.server.metrics()) and select(s, "moe_monitor_errors_total", where="latency") and s, 3
    )
    assert only(samples, "moe_monitor_active") == 1
    counted = only(samples, "moe_routed_tokens_total", layer="0")
    plant.unlink()
    assert traffic.send(prompt, max_tokens=60) == before
    computed = sum(n for step in traffic.settled()["steps"] for _, _, n in step)
    assert computed > counted
    assert eventually(lambda: only(traffic.server.metrics(), "moe_routed_tokens_total", layer="0") == computed, 3)
    assert traffic.server.log.count("times no layers any more") == 1


def test_a_failing_scrape_costs_vllms_metrics_nothing(traffic: Traffic, tmp_path: Path) -> None:
    plant = traffic.schedule.parent / "collect"
    plant.touch()
    try:
        samples = traffic.server.metrics()
        assert select(samples, "vllm:num_requests_running")
        assert only(samples, "moe_monitor_active", engine="0") == 0
        assert only(samples, "moe_monitor_errors_total", where="collect") >= 1
    finally:
        plant.unlink()
    assert only(traffic.server.metrics(), "moe_monitor_active", engine="0") == 1
    assert traffic.server.log.count("planted in collect") == 1


def test_a_failure_while_recording_switches_the_monitor_off_and_nothing_else(traffic: Traffic) -> None:
    """Last in this file: it leaves the server's monitor off."""
    prompt = traffic.prompt(20)
    before = traffic.send(prompt)
    (traffic.schedule.parent / "record").touch()
    assert traffic.send(prompt) == before
    samples = eventually(lambda: (s := traffic.server.metrics()) and not only(s, "moe_monitor_active") and s, 3)
    assert only(samples, "moe_monitor_errors_total", where="record") == 1
    (traffic.schedule.parent / "record").unlink()
    assert traffic.send(prompt) == before
    assert traffic.server.log.count("moe-monitor switched itself off") == 1
    assert "planted in record" in traffic.server.log
    command = [sys.executable, "-m", "moe_monitor.cli.main", "doctor"]
    doctor = subprocess.run(
        command,
        env={"MOE_MONITOR_DIR": str(traffic.server.run_dir), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert doctor.returncode == 1
    assert "planted in record" in doctor.stdout
