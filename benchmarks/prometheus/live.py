"""Previews from a real server: a tiny OLMoE under vLLM on the CPU, a real Prometheus with the rules as shipped.

    python benchmarks/prometheus/live.py --out DIR [--minutes 12] [--dashboard UID ...]

Clients send prompts of several lengths all the time; in the second half, two of five repeat one token over and over,
which makes the routing of their requests concentrated. All requests are traced, one pass in twenty is timed. The model
has random weights, so absolute numbers mean nothing.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import models
import stack
from serving import eventually, only, serving

from moe_monitor.cli.main import main as moe_monitor

SETTINGS = {"MOE_MONITOR_SAMPLE_RATIO": "1", "MOE_MONITOR_LATENCY_EVERY": "20"}


def client(server, which, begin, minutes):
    draw = random.Random(which)
    serial = 0
    while (elapsed := time.monotonic() - begin) < 60 * minutes:
        length = draw.choice((8, 30, 90, 200))
        repeats = which < 2 and elapsed > 30 * minutes
        prompt = [draw.randrange(3, 300)] * length if repeats else [draw.randrange(3, 300) for _ in range(length)]
        server.complete(prompt, f"{which}-{serial}", max_tokens=4 if repeats else draw.choice((8, 24, 48)))
        serial += 1
        time.sleep(draw.expovariate(2))


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--dashboard", action="append", default=[])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model, normal = models.olmoe(folder / "model"), folder / "normal.json"
        processes, receiver = stack.Processes(folder), stack.Receiver()
        flags = ["--enforce-eager", "--max-model-len", "512", "--no-enable-prefix-caching"]
        settings = SETTINGS | {"MOE_MONITOR_BASELINE": str(normal)}
        with serving(model, folder / "server", *flags, **settings) as server:
            begin = time.monotonic()
            clients = [threading.Thread(target=client, args=(server, i, begin, arguments.minutes)) for i in range(5)]
            for thread in clients:
                thread.start()
            try:
                record = ["baseline", "record", str(normal), "--dir", str(server.run_dir)]
                assert moe_monitor([*record, "--window", "5", "--duration", "30"]) == 0
                eventually(lambda: only(server.metrics(), "moe_baseline_usable", engine="0") == 1, 20)
                prometheus = stack.start(folder, processes, f"127.0.0.1:{server.port}", receiver, fast=False)
                for thread in clients:
                    thread.join()
                command = [sys.executable, str(ROOT / "grafana" / "preview.py"), "--url", prometheus.url]
                command += ["--out", str(arguments.out), "--hours", str((time.monotonic() - begin) / 3600)]
                command += [word for uid in arguments.dashboard for word in ("--dashboard", uid)]
                subprocess.run(command, check=True)
                print("alerts received:", sorted(receiver.by_name()))
            finally:
                processes.stop()
                receiver.stop()


if __name__ == "__main__":
    main()
