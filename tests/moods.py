"""A server that traces every request, while its collector refuses, is slow, hangs, is gone and comes back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from otlp import Receiver
from serving import Samples, Server, only, select

MOODS = ("kind", "refusing", "slow", "hanging", "gone", "kind")

#: What a request's way to its span can end in.
LOSSES = ("spans", "request_records", "traced_requests", "lost_requests")


def resident(server: Server) -> dict[int, int]:
    """Resident bytes by process of the server's group."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid = int(status.parent.name)
            if os.getpgid(pid) == server.process.pid:
                pages = int((status.parent / "statm").read_text().split()[1])
                found[pid] = pages * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ProcessLookupError, ValueError):
            continue
    return found


def _mib(server: Server) -> tuple[float, float]:
    found = resident(server)
    api = found.pop(server.process.pid, 0)
    return api / 2**20, sum(found.values()) / 2**20


def lost(samples: Samples) -> dict[str, int]:
    return {what: int(sum(select(samples, "moe_monitor_dropped_total", what=what).values())) for what in LOSSES}


@dataclass
class Phase:
    mood: str
    requests: int = 0
    failed: int = 0
    seconds: float = 0.0
    slowest_scrape_s: float = 0.0
    longest_request_s: float = 0.0
    #: Resident MiB when the phase ended, as in Report.memory.
    api_server_mib: float = 0.0
    engine_mib: float = 0.0
    dropped_spans: int = 0
    spans_arrived: int = 0


@dataclass
class Report:
    phases: list[Phase] = field(default_factory=list)
    #: (requests so far, resident MiB of the API server, of the engine and its workers)
    memory: list[tuple[int, float, float]] = field(default_factory=list)
    answered: int = 0
    counted: int = 0
    arrived: int = 0
    lost: dict[str, int] = field(default_factory=dict)


def run(
    server: Server,
    receiver: Receiver,
    requests: int,
    *,
    moods: Sequence[str] = MOODS,
    threads: int = 12,
    least_s: float = 0.0,
) -> Report:
    """``requests`` short requests, spread over the moods, each of which lasts at least ``least_s`` seconds: an exporter
    gives up a call after 10. The receiver is kind again at the end.
    """
    report = Report()
    began = server.metrics()
    arrived = len(receiver.named("moe.routing"))
    counted = _counted(began)
    before = lost(began)
    for i, mood in enumerate(moods):
        share = requests * (i + 1) // len(moods) - requests * i // len(moods)
        start = time.monotonic()
        phase = _phase(server, receiver, mood, share, threads, report)
        report.phases.append(phase)
        time.sleep(max(0.0, least_s - (time.monotonic() - start)))
        phase.dropped_spans = lost(server.metrics())["spans"] - before["spans"]
        # spans come seconds after their requests, and must meet this mood
        while mood == "refusing" and phase.dropped_spans < share and time.monotonic() - start < 20:
            time.sleep(0.2)
            phase.dropped_spans = lost(server.metrics())["spans"] - before["spans"]
        phase.spans_arrived = len(receiver.named("moe.routing")) - arrived
    end = time.monotonic() + 60
    while time.monotonic() < end:  # what waits in queues is sent or given up
        samples = server.metrics()
        report.lost = {what: n - before[what] for what, n in lost(samples).items()}
        report.arrived = len(receiver.named("moe.routing")) - arrived
        report.counted = _counted(samples) - counted
        if report.arrived + sum(report.lost.values()) >= report.answered:
            break
        time.sleep(0.5)
    assert only(samples, "moe_monitor_active") == 1
    return report


def _counted(samples: Samples) -> int:
    return int(sum(select(samples, "moe_request_entropy_ratio_count").values()))


def _phase(server: Server, receiver: Receiver, mood: str, share: int, threads: int, report: Report) -> Phase:
    phase = Phase(mood)
    if mood == "gone":
        receiver.stop()
    else:
        if report.phases and report.phases[-1].mood == "gone":
            receiver.start()
        receiver.mood = mood
    lock = threading.Lock()
    stop = threading.Event()

    def send(i: int) -> None:
        start = time.monotonic()
        try:
            server.complete([3 + i % 290, 5, 7], f"soak-{mood}-{report.answered}-{i}", max_tokens=2)
        except OSError:
            with lock:
                phase.failed += 1
        took = time.monotonic() - start
        with lock:
            phase.longest_request_s = max(phase.longest_request_s, took)
            phase.requests += 1
            done = report.answered + phase.requests
        if done % 200 == 0:
            with lock:
                report.memory.append((done, *_mib(server)))

    def scrape() -> None:
        while not stop.wait(1):
            start = time.monotonic()
            server.metrics()
            phase.slowest_scrape_s = max(phase.slowest_scrape_s, time.monotonic() - start)

    scraper = threading.Thread(target=scrape)
    scraper.start()
    start = time.monotonic()
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(send, range(share)))
    finally:
        stop.set()
        scraper.join()
    phase.seconds = time.monotonic() - start
    phase.api_server_mib, phase.engine_mib = _mib(server)
    report.answered += phase.requests - phase.failed
    return phase


def check(report: Report, requests: int) -> None:
    """Every request was answered, has a span or is counted as given up, and is in the request metrics."""
    assert report.answered == requests, "requests failed"
    assert report.lost["spans"] > 0
    assert report.arrived > 0
    assert report.arrived + sum(report.lost.values()) == requests
    assert report.counted == requests - report.lost["request_records"] - report.lost["traced_requests"]


def as_markdown(report: Report, setting: dict[str, Any]) -> str:
    """The table that is committed."""
    lines = [f"{key}: {value}  " for key, value in setting.items()]
    head = (
        "| collector | requests | failed | s | longest request, s | slowest scrape, s | API server, MiB | engine, MiB |"
    )
    lines += ["", head + " spans dropped, so far |", "|" + " --- |" * 9]
    for p in report.phases:
        lines.append(
            f"| {p.mood} | {p.requests:,} | {p.failed} | {p.seconds:.1f} | {p.longest_request_s:.2f} | "
            f"{p.slowest_scrape_s:.2f} | {p.api_server_mib:.0f} | {p.engine_mib:.0f} | {p.dropped_spans} |"
        )
    lines += ["", f"Answered {report.answered}, in request metrics {report.counted}, spans arrived {report.arrived}, "]
    lines[-1] += "given up: " + ", ".join(f"{what} {n}" for what, n in report.lost.items()) + "."
    every = max(1, len(report.memory) // 10)
    told = [f"{n:,}: {api:.0f} + {engine:.0f}" for n, api, engine in report.memory[::every]]
    lines.append("Resident MiB (API server + engine) by requests: " + ", ".join(told) + ".")
    return "\n".join(lines) + "\n"
