"""Exactness over several GPUs: a real server, and the in-graph shadow in each of its workers.

parallel.py [--family qwen3_moe] -- SERVER OPTIONS     for example: -- -tp 2 --enable-expert-parallel
Prints one JSON line: largest difference between the boards' rows (summed over engines) and the shadows' (one per
engine: tensor-parallel ranks repeat each other), and the expert-parallel metrics of /metrics.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import models
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", default="qwen3_moe")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument(
        "--repeats", type=int, default=1, help="ranks that repeat each other's routing (-tp without -dp)"
    )
    args, options = parser.parse_known_args()
    options = [o for o in options if o != "--"]
    scratch = Path(tempfile.mkdtemp())
    (scratch / "shadow").mkdir()
    folder = models.write(scratch / args.family, args.family)
    inject = str(Path(__file__).parent / "inject")
    env = os.environ | {"SHADOW_DIR": str(scratch / "shadow"), "MOE_MONITOR_DIR": str(scratch / "run")}
    env["PYTHONPATH"] = os.pathsep.join([inject, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port"]
    command += [str(args.port), "--load-format", "dummy", "--served-model-name", "m", "--gpu-memory-utilization", "0.2"]
    command += ["--max-model-len", "2048", "--cudagraph-capture-sizes", "1", "4", "16", "64", *options]
    start = time.time()
    with (scratch / "log").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{args.port}"
        while True:
            if server.poll() is not None or time.time() - start > 330:
                print((scratch / "log").read_text()[-3000:])
                raise SystemExit("the server did not start")
            try:
                urllib.request.urlopen(url + "/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        ready = time.time() - start
        draw = random.Random(4)

        def send(_: int) -> None:
            prompt = [draw.randrange(4000) for _ in range(draw.choice([3, 60, 400, 1300]))]
            body = {"model": "m", "prompt": prompt, "max_tokens": draw.choice([1, 20, 60]), "ignore_eos": True}
            request = urllib.request.Request(
                url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            urllib.request.urlopen(request, timeout=120).read()

        with ThreadPoolExecutor(48) as pool:
            list(pool.map(send, range(args.requests)))
        time.sleep(2)
        from moe_monitor.layout import RowLayout
        from moe_monitor.snapshot import read_engines

        engines = read_engines(scratch / "run")
        mine = sum(e.rows for e in engines)
        shadows = [np.load(p) for p in sorted((scratch / "shadow").glob("*.npy")) if ".tmp" not in p.name]
        theirs = sum(shadows) // args.repeats
        layout = RowLayout(engines[0].layout.experts)
        text = urllib.request.urlopen(url + "/metrics").read().decode()
        ep = [line for line in text.splitlines() if line.startswith("moe_ep_rank") and 'layer="1"' in line]
        difference = {k: int(np.abs(mine - theirs)[:, s].max()) for k, s in layout.offsets.items()}
        placed = {str(r): len(x) for e in engines for r, x in e.placement.items()}
        result = {
            "options": options,
            "ready_s": round(ready, 1),
            "engines": {e.engine: [e.status.active, e.status.capture, e.status.reason, e.passes] for e in engines},
            "tokens": int(layout.column(mine, "tokens").max()),
            "shadow_tokens": int(layout.column(theirs, "tokens").max()),
            "shadows": len(shadows),
            "largest_difference": {k: v for k, v in difference.items() if v},
            "experts_per_ep_rank": placed,
            "ep_metrics_layer_1": ep,
        }
        print("RESULT " + json.dumps(result), flush=True)
        notes = [line for line in (scratch / "log").read_text().splitlines() if "moe-monitor" in line]
        print("\n".join(line[:200] for line in notes[:6]))
    finally:
        server.send_signal(signal.SIGTERM)
        time.sleep(3)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
