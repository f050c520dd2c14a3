"""Processor time that traced requests take in an API server, without vLLM: a worker's records, the front end, no GPU.

front_end.py [--requests 170] [--share 0.1] [--seconds 20] [--layers 16] [--experts 64]
So many requests end each second, of which the share is traced: a worker's board gets their records, the front end is
told of every request and matches them, as in a server whose requests have 64 tokens in and 64 out. Prints milliseconds
of processor time per second, of all threads but the one that plays worker and vLLM, and microseconds per traced
request. An API server streams on one core, so ten of these milliseconds are about a percent of what it can do.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from moe_monitor.board import BoardWriter
from moe_monitor.export.collector import MoeCollector
from moe_monitor.export.frontend import Finished, FrontEnd
from moe_monitor.export.requests import FleetLoad
from moe_monitor.layout import RowLayout
from moe_monitor.records import Meta, RecordWriter, Tally, record_segments
from moe_monitor.snapshot import STATUS_SEGMENT, Status, routing_segment

TOP_K = 8


def tally(rng: np.random.Generator, name: str, layers: int, experts: int) -> Tally:
    prompt, output = (int(n) for n in rng.integers(32, 96, 2))
    stats = np.zeros((layers, 8), dtype=np.int64)
    stats[:, 0], stats[:, 1] = prompt, output
    stats[:, 2:6] = (prompt + output) * 800_000, 500_000, (prompt + output) * 100_000, (prompt + output) * 400_000
    counts = [[np.bincount(rng.integers(0, experts, n * TOP_K), minlength=experts) for n in (prompt, output)]] * layers
    return Tally(Meta(name, prompt, 0, 0, time.time(), time.time()), np.array(counts, dtype=np.int32), stats)


def processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime - time.thread_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=float, default=170, help="a second")
    parser.add_argument("--share", type=float, default=0.1, help="of them that is traced")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    args = parser.parse_args()
    logger, rng = logging.getLogger("bench"), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o700)
        identity = {"layers": list(range(args.layers)), "experts": args.experts, "top_k": TOP_K, "scoring": "softmax"}
        identity |= {"engine": "0", "model_name": "m", "server": "server", "pid": os.getpid(), "version": "1"}
        identity |= {"dp_rank": 0, "tp_rank": 0, "pp_rank": 0}
        width = RowLayout(args.experts).width
        segments = {"status": STATUS_SEGMENT, "routing": routing_segment(args.layers, width)}
        segments |= record_segments(args.layers, args.experts)
        board = BoardWriter(directory, "server.engine.0", identity, segments)
        board.write("status", {"json": Status(active=True).to_array()})
        rows = rng.integers(0, 1 << 20, (args.layers, width))
        writer = RecordWriter(board, segments)
        collector = MoeCollector(directory, server="server", max_series=10_000, gentle=True, logger=logger)
        collector.start()
        front = FrontEnd(directory, "server", FleetLoad(collector), logger)
        done, traced, before, begin = 0, 0, processor_time(), time.monotonic()
        while (now := time.monotonic() - begin) < args.seconds:
            while done < now * args.requests:
                done += 1
                request = f"cmpl-{done:032x}-0"
                front.finish(request, Finished(at=time.monotonic(), e2e=1.0, ttft=0.1, tpot=0.01))
                if done * args.share >= traced + 1:
                    traced += 1
                    writer.write([tally(rng, request, args.layers, args.experts)])
            rows += 1
            board.write("routing", {"rows": rows, "passes": np.array([done])})
            time.sleep(0.05)
        spent = processor_time() - before
        front.close()
        board.close()
    result = {"requests_per_s": args.requests, "traced": traced, "ms_per_s": round(1e3 * spent / args.seconds, 1)}
    result |= {"us_per_traced": round(1e6 * spent / traced) if traced else None}
    result |= {
        "layers": args.layers,
        "experts": args.experts,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    print(json.dumps(result | {"cores": os.cpu_count(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
