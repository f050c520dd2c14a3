"""End to end: ``vllm bench serve`` against servers with and without the monitor, paired and alternating.

end_to_end.py [--rounds 2] [--gpus 0,1]
One server with and one without the monitor on each GPU. With two GPUs a round measures "with" on one while "without"
runs on the other, then the other way round, so that differences between the GPUs cancel. With one GPU (``--gpus 0``)
the two run one after the other and take turns in being the first. Prints a line per concurrency.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import models

METRICS = ("median_itl_ms", "median_ttft_ms", "output_throughput")
#: concurrency -> number of prompts
LOADS = {1: 12, 32: 256, 128: 640}


def start(folder: Path, port: int, gpu: str, on: bool, scratch: Path) -> subprocess.Popen:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "MOE_MONITOR_ENABLED": str(int(on))}
    env |= {"MOE_MONITOR_DIR": str(scratch / "run")}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--load-format", "dummy", "--served-model-name", "m", "--gpu-memory-utilization", "0.35"]
    command += ["--max-model-len", "2048", "--no-enable-prefix-caching"]
    with (scratch / f"{port}.log").open("w") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def bench(folder: Path, port: int, concurrency: int, scratch: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--model", "m"]
    command += ["--tokenizer", str(folder), "--port", str(port), "--dataset-name", "random", "--ignore-eos"]
    command += ["--random-input-len", "128", "--random-output-len", "128", "--num-prompts", str(LOADS[concurrency])]
    command += ["--max-concurrency", str(concurrency), "--save-result", "--result-dir", str(scratch)]
    command += ["--result-filename", f"{port}.json", "--seed", "1"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(scratch / f"bench-{port}.log").open("w"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gpus", default="0,1")
    args = parser.parse_args()
    gpus = args.gpus.split(",")
    scratch = Path(tempfile.mkdtemp())
    folder = models.write(scratch / "olmoe")
    servers = {}
    for i, gpu in enumerate(gpus):
        for on in (True, False):
            port = 8200 + 10 * i + on
            servers[i, on] = (port, start(folder, port, gpu, on, scratch))
        time.sleep(25)  # the first pair fills the compile cache and takes its memory before the next looks
    try:
        began = time.time()
        for port, process in servers.values():
            while True:
                if process.poll() is not None or time.time() - began > 240:
                    print((scratch / f"{port}.log").read_text()[-2500:])
                    raise SystemExit("a server did not start")
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                except OSError:
                    time.sleep(0.5)
        print(f"READY {time.time() - began:.0f} s after the last start", flush=True)
        for concurrency in LOADS:
            results = {True: {m: [] for m in METRICS}, False: {m: [] for m in METRICS}}
            for turn in range(2 * args.rounds + 1):
                on_gpu = turn % len(gpus)
                off_gpu = (turn + 1) % len(gpus)
                pair = [(on_gpu, True), (off_gpu, False)]
                runs = []
                for g, on in pair if turn % 2 else reversed(pair):
                    runs.append(bench(folder, servers[g, on][0], concurrency, scratch))
                    if len(gpus) == 1:
                        runs[-1].wait()
                for process in runs:
                    process.wait()
                if turn == 0:
                    continue  # warm-up
                for on, g in ((True, on_gpu), (False, off_gpu)):
                    data = json.loads((scratch / f"{servers[g, on][0]}.json").read_text())
                    for m in METRICS:
                        results[on][m].append(data[m])
            line = {"concurrency": concurrency, "pairs": 2 * args.rounds}
            for m in METRICS:
                on, off = results[True][m], results[False][m]
                line[m] = {
                    "on": round(statistics.median(on), 3),
                    "off": round(statistics.median(off), 3),
                    "ratio": round(statistics.geometric_mean([a / b for a, b in zip(on, off, strict=True)]), 4),
                    "all_on": [round(x, 3) for x in on],
                    "all_off": [round(x, 3) for x in off],
                }
            print("E2E " + json.dumps(line), flush=True)
        text = urllib.request.urlopen(f"http://127.0.0.1:{servers[0, True][0]}/metrics").read().decode()
        wanted = (
            "moe_monitor_active",
            "moe_routed_tokens_total",
            "moe_monitor_hook",
            "moe_forward_passes",
            "moe_monitor_info",
        )
        print("\n".join(line for line in text.splitlines() if line.startswith(wanted))[:1200])
    finally:
        for _, process in servers.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
