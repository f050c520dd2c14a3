"""58 layers x 256 experts x 8 engines: what a scrape costs, alone and in a live server that streams tokens.

    python benchmarks/scale.py [--seconds 20] [--rounds 3] [--out benchmarks/results/scale.json]

Boards of eight engines of that shape are written twice a second by a process of its own. Measured:

exporter    a stand-alone `moe-monitor export` is scraped, plainly and with gzip: time to the last byte; its CPU
in_process  the same collector called without HTTP, whole matrix and as a vLLM server shows it; one read; one publish
live        a real vLLM server (tiny OLMoE) under whose id the boards are written, so that its own /metrics shows them.
            Clients stream tokens. A task on its event loop wakes every 2 ms and notes how late it was; the worst of
            each scrape is compared with the worst of equally long stretches without a scrape, of scrapes of the server
            without those boards, and of a server without the monitor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from boards import FakeWorker
from serving import Server, free_port

from moe_monitor import __version__
from moe_monitor.board import board_paths
from moe_monitor.capture.fuse import Fuse
from moe_monitor.capture.publisher import Publisher, Reading
from moe_monitor.export.collector import MoeCollector

LAYERS, EXPERTS, TOP_K, ENGINES = 58, 256, 8, 8
SHAPE = {"layers": tuple(range(LAYERS)), "experts": EXPERTS, "top_k": TOP_K, "model_name": "large", "traced": True}


def write(directory: str, server: str, seconds: float) -> None:
    """Run as a process: eight engines that publish new numbers twice a second."""
    workers = [
        FakeWorker(Path(directory), name=f"{server}.{i}.0", server=server, engine=str(i), **SHAPE)
        for i in range(1, ENGINES + 1)
    ]
    added = workers[0].rows % 1009
    print("ready", flush=True)
    end, passes = time.monotonic() + seconds, 1
    while time.monotonic() < end:
        passes += 1
        for worker in workers:
            worker.rows = worker.rows + added
            worker.publish(passes)
        time.sleep(0.5)
    for worker in workers:
        worker.board.close()


@contextlib.contextmanager
def boards(directory: Path, server: str, seconds: float):
    command = [sys.executable, __file__, "--write", str(directory), server, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    try:
        yield
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def summary(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    values = np.array(seconds) * 1000
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {
        "n": len(values),
        "p50": round(p50, 2),
        "p90": round(p90, 2),
        "p99": round(p99, 2),
        "max": round(values.max(), 2),
    }


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def get(url: str, *, packed: bool) -> bytes:
    request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip"} if packed else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def exporter(folder: Path) -> dict:
    directory, port = folder / "run", free_port()
    command = [sys.executable, "-m", "moe_monitor.cli.main", "export", "--dir", str(directory), "--port", str(port)]
    result = {}
    with boards(directory, "scale", 600):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        url = f"http://127.0.0.1:{port}/metrics"
        try:
            for name, packed in (("plain", False), ("gzip", True)):
                took, size = [], 0
                for _ in range(203):
                    started = time.perf_counter()
                    size = len(get(url, packed=packed))
                    took.append(time.perf_counter() - started)
                    time.sleep(0.05)
                result[name] = summary(took[3:]) | {"bytes": size, "first": [round(1000 * t, 1) for t in took[:3]]}
            result["samples"] = sum(not line.startswith(b"#") for line in get(url, packed=False).splitlines())
            before, started = cpu_seconds(process.pid), time.monotonic()
            time.sleep(15)
            idle = cpu_seconds(process.pid) - before
            get(url, packed=True)
            took = time.monotonic() - started
            result["cpu_share_at_one_scrape_in_15_s"] = round((cpu_seconds(process.pid) - before) / took, 4)
            result["cpu_share_without_scrapes"] = round(idle / 15, 4)
            result["rss_mib"] = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4 // 1024
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()
    return result


class Rows:
    """A publisher's source that always has something new."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.passes = rows, 0

    def read(self) -> Reading:
        return Reading(self.rows, self.passes)


def stretches(directory: Path, workers: list[FakeWorker]) -> list[float]:
    """Of each scrape within a server the longest time for which it keeps Python's lock, in seconds of CPU time."""
    longest, since, found = 0.0, 0.0, []

    def pause() -> None:
        nonlocal longest, since
        longest = max(longest, time.thread_time() - since)
        time.sleep(0.0001)
        since = time.thread_time()

    collector = MoeCollector(directory, max_series=2048, server="s", gentle=True)
    collector._pause = collector._exposition._pause = pause
    for i in range(30):
        for worker in workers:
            worker.rows = worker.rows + worker.rows % 7
            worker.publish(i + 40)
        longest, since = 0.0, time.thread_time()
        collector.render()
        pause()
        found.append(longest)
    return found[2:]


def in_process(folder: Path) -> dict:
    directory = folder / "inside"
    workers = [FakeWorker(directory, name=f"s.{i}.0", server="s", engine=str(i), **SHAPE) for i in range(ENGINES)]
    sizes = [p.stat().st_size for p in board_paths(directory)]
    result: dict = {"board_bytes": sizes[0], "boards_bytes": sum(sizes)}
    for name, options in {"whole": {"max_series": None}, "as_in_vllm": {"max_series": 2048, "server": "s"}}.items():
        collector, took, cpu, text = MoeCollector(directory, **options), [], [], b""
        for i in range(30):
            for worker in workers:
                worker.rows = worker.rows + worker.rows % 7
                worker.publish(i + 2)
            started, busy = time.perf_counter(), time.thread_time()
            text = collector.render()
            took.append(time.perf_counter() - started)
            cpu.append(time.thread_time() - busy)
        result[name] = {"wall": summary(took[2:]), "cpu": summary(cpu[2:]), "bytes": len(text)}
        result[name]["samples"] = sum(not line.startswith(b"#") for line in text.splitlines())
    result["longest_stretch_cpu"] = summary(stretches(directory, workers))
    reads = []
    for _ in range(30):
        busy = time.thread_time()
        collector.read()
        reads.append(time.thread_time() - busy)
    result["read_all_boards_cpu"] = summary(reads)
    source = Rows(workers[0].rows)
    logger = logging.getLogger("scale")
    facts = workers[0].facts | {"server": "p", "engine": "0"}
    publisher = Publisher(
        folder / "publish", "p.0.0", facts, Fuse(logger), source, interval=60, log_interval=0, logger=logger
    )
    published = []
    for _ in range(200):
        source.passes += 1
        busy = time.thread_time()
        publisher.publish()
        published.append(time.thread_time() - busy)
    publisher.close()
    result["publish_cpu"] = summary(published)
    result["publisher_cpu_share_at_two_a_second"] = round(2 * statistics.median(published), 6)
    for worker in workers:
        worker.board.close()
    return result


class Streams:
    """Clients that read tokens as they come, one request after the other."""

    def __init__(self, server: Server, clients: int) -> None:
        self.server, self.stopped, self.tokens = server, threading.Event(), 0
        self.threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(clients)]
        for thread in self.threads:
            thread.start()

    def _run(self, start: int) -> None:
        body = {"model": "tiny", "prompt": [3 + start] * 20, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        data = json.dumps(body | {"stream": True}).encode()
        url = f"http://127.0.0.1:{self.server.port}/v1/completions"
        while not self.stopped.is_set():
            request = urllib.request.Request(url, data, {"content-type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                for line in answer:
                    self.tokens += line.startswith(b"data: {")
                    if self.stopped.is_set():
                        break

    def stop(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()


def stretch(server: Server, seconds: float, *, scrape: bool) -> list[tuple[float, float]]:
    """(begin, end) of scrapes twice a second, or of stretches without one that last as long as a scrape might."""
    spans, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        if scrape:
            get(f"http://127.0.0.1:{server.port}/metrics", packed=True)
        else:
            time.sleep(0.1)
        spans.append((began, time.monotonic()))
        time.sleep(0.4)
    return spans


def lateness(beats: Path, spans: list[tuple[float, float]]) -> dict:
    data = np.loadtxt(beats)
    at, late = data[:, 0], data[:, 1]
    # A wake-up that was due within the span is noted when it came, which may be after it.
    worst = [late[(at >= a) & (at - late <= b)].max() for a, b in spans if ((at >= a) & (at - late <= b)).any()]
    return {"worst_of_each": summary(worst), "duration": summary([b - a for a, b in spans])}


def live(folder: Path, model: Path, seconds: float, rounds: int, *, enabled: bool) -> dict:
    folder.mkdir()
    beats = folder / "beats"
    env = {"MOE_TEST_HEARTBEAT": str(beats), "MOE_MONITOR_ENABLED": str(int(enabled)), "OMP_NUM_THREADS": "1"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    server = Server(model, folder / "log", folder / "run", "--enforce-eager", "--max-model-len", "512", **env)
    phases: dict[str, list[tuple[float, float]]] = {"no_scrape": [], "scrape": [], "scrape_large": []}
    try:
        server.wait()
        streams = Streams(server, 4)
        time.sleep(2)
        started, busy = time.monotonic(), cpu_seconds(server.process.pid)
        for _ in range(rounds):
            phases["no_scrape"] += stretch(server, seconds, scrape=False)
            phases["scrape"] += stretch(server, seconds, scrape=True)
            if enabled:
                name = board_paths(server.run_dir)[0].name.split(".")[0]
                with boards(server.run_dir, name, 10 * seconds):
                    stretch(server, 3, scrape=True)
                    phases["scrape_large"] += stretch(server, seconds, scrape=True)
        wall = time.monotonic() - started
        share = (cpu_seconds(server.process.pid) - busy) / wall
        streams.stop()
        time.sleep(1)
    finally:
        server.stop()
    result = {name: lateness(beats, spans) for name, spans in phases.items() if spans}
    return result | {"tokens_a_second": round(streams.tokens / wall), "api_server_cpu_share": round(share, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="of each phase in the live server")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--skip-live", action="store_true")
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write(args.write[0], args.write[1], float(args.write[2]))
        return
    result: dict = {
        "when": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "command": " ".join(["python", "benchmarks/scale.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "moe-monitor": __version__, "numpy": np.__version__},
        "shape": {"layers": LAYERS, "experts": EXPERTS, "engines": ENGINES},
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        result["in_process"] = in_process(folder)
        result["exporter"] = exporter(folder)
        if not args.skip_live:
            import models

            model = models.olmoe(folder / "model")
            result["live"] = live(folder / "on", model, args.seconds, args.rounds, enabled=True)
            result["live_without_monitor"] = live(folder / "off", model, args.seconds, args.rounds, enabled=False)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
