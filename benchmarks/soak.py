"""A long stretch of load on one real vLLM server: are counts exact at its end, and do its processes stay the same size?

    python benchmarks/soak.py [--minutes 15] [--account] [--out benchmarks/results/soak.json]

A tiny OLMoE on the CPU; several clients send prompts whose routing is known from transformers, half of them traced. A
scrape a second, as fifteen Prometheus servers would send them. Every few seconds: resident memory, file
descriptors and threads of each process of the server and of a stand-alone exporter beside it. At the end every routed
token is compared, and the trend over the second half of the time is fitted.

With --account Python's allocations are traced (tracemalloc; everything is slower): what lines of moe_monitor have
allocated and still hold, apart from vLLM's growth. Memory of torch's tensors is not in it.

How many hours it stands for: tokens and passes are given; a publisher's rounds, reads of the windows and scrapes are as
many as in that many minutes, since their rate is set by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from live import Live, sizes
from oracle import Oracle
from serving import Server, eventually, free_port

from moe_monitor import __version__

ARGUMENTS = ["--enforce-eager", "--max-model-len", "512", "--no-enable-prefix-caching", "--max-num-seqs", "16"]


def processes(leader: int) -> dict[int, str]:
    """Processes of a server's group, named by what they are."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            command = (entry / "cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            role = "api_server" if int(entry.name) == leader else "engine" if "EngineCore" in command else "other"
            found[int(entry.name)] = role if role != "other" else f"other: {command[-60:]}"
    return found


def listening(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def trend(series: list[dict[str, float]], name: str) -> dict[str, float]:
    """First and last reading after warm-up (a third of the time), and the slope over the second half, by hour."""
    at = np.array([s["at"] for s in series])
    values = np.array([s[name] for s in series], dtype=float)
    late = at >= at[-1] / 2
    slope = np.polyfit(at[late] / 3600, values[late], 1)[0] if late.sum() > 2 else float("nan")
    warm = int(np.searchsorted(at, at[-1] / 3))
    return {
        "at_start": values[0],
        "after_a_third": values[warm],
        "at_end": values[-1],
        "max": values.max(),
        "slope_an_hour": round(float(slope), 1),
    }


def held(folder: Path, roles: dict[int, str]) -> dict[str, dict[str, list[int]]]:
    """KiB by process, every minute: allocated by lines of moe_monitor, and by all of Python."""
    found = {}
    for pid, role in roles.items():
        if (file := folder / str(pid)).exists():
            lines = [[int(x) >> 10 for x in line.split()] for line in file.read_text().splitlines()]
            ours, everything = zip(*lines, strict=True)
            found[role] = {"moe_monitor_kib": list(ours), "python_kib": list(everything)}
    return found


def soak(
    folder: Path, model: Path, seconds: float, clients: int, every: float, *, enabled: bool, account: bool = False
) -> dict:
    """Load a server for so long. Raises AssertionError when a token or a count is wrong."""
    env = {
        "MOE_MONITOR_ENABLED": str(int(enabled)),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "MOE_MONITOR_SAMPLE_RATIO": "0.5",
    }
    if account:
        env["MOE_TEST_MEMORY"] = str(folder)
    server = Server(model, folder / "server.log", folder / "run", *ARGUMENTS, **env)
    port, readings, scrapes = free_port(), {}, [0, 0]
    command = [sys.executable, "-m", "moe_monitor.cli.main", "export", "--port", str(port)]
    command += ["--dir", str(folder / "run")]
    exporter, stopped = None, threading.Event()

    def scrape() -> None:
        while not stopped.wait(1):
            for url in (f"http://127.0.0.1:{server.port}/metrics", f"http://127.0.0.1:{port}/metrics"):
                request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip"})
                with urllib.request.urlopen(request, timeout=30) as answer:
                    scrapes[0] += 1
                    scrapes[1] += len(answer.read())

    try:
        live = Live(server.wait(), Oracle(model))
        live.learn()
        exporter = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        eventually(lambda: listening(port), 60)
        scraping = threading.Thread(target=scrape)
        scraping.start()
        watched = processes(server.process.pid) | {exporter.pid: "exporter"}
        started = time.monotonic()
        with live.load(seconds=seconds, workers=clients) as load:
            while (at := time.monotonic() - started) < seconds:
                for pid, role in watched.items():
                    readings.setdefault(role, []).append({"at": at} | sizes(pid))
                time.sleep(every)
        stopped.set()
        scraping.join()
        assert processes(server.process.pid) == {p: r for p, r in watched.items() if r != "exporter"}
        if enabled:
            live.check_exact(seconds=10)
        samples = {k[0]: v for k, v in live.server.metrics().items()}
        result = {
            "minutes": round((time.monotonic() - started) / 60, 1),
            "requests": load.done,
            "traced_requests": int(samples.get("moe_monitor_sampled_requests_total", 0)),
            "passes": int(samples.get("moe_forward_passes_total", 0)),
            "tokens_computed": live.tokens,
            "tokens_counted": int(samples.get("moe_routed_tokens_total", 0)),
            "routings_compared_with_transformers": int(live.expected().sum()),
            "router_ties": live.oracle.ties,
            "scrapes": scrapes[0],
        }
        if account:
            result["held"] = held(folder, watched)
        for role, series in readings.items():
            result[role] = {name: trend(series, name) for name in ("rss_kib", "threads", "descriptors")}
        return result
    finally:
        stopped.set()
        if exporter is not None:
            exporter.terminate()
            exporter.wait()
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--off", action="store_true", help="without the monitor, to compare sizes with")
    parser.add_argument("--account", action="store_true", help="trace Python's allocations")
    args = parser.parse_args()
    import models

    with tempfile.TemporaryDirectory() as scratch:
        model = models.olmoe(Path(scratch) / "model")
        result = {
            "when": f"{datetime.now(timezone.utc):%Y-%m-%d}",
            "command": " ".join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
            "versions": {"moe-monitor": __version__, "vllm-cpu": version("vllm-cpu"), "torch": version("torch")},
        } | soak(Path(scratch), model, args.minutes * 60, args.clients, 5, enabled=not args.off, account=args.account)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
