"""What a call takes at the edge of a chunk of CPython's frames, and on top of a frame that leaves room for all.

frames.py [--depths 600] [--calls 20000]

A function without work is called from each depth. At most depths its frame fits into the thread's chunk of 16 KiB; at
some it has another chunk mapped, and its return unmaps it. Prints the median and the slowest call, and page faults a
call at that depth. See moe_monitor/capture/vllm/loops.py, which gives vLLM's loops room.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import sys
import time

from moe_monitor.capture.vllm.loops import roomy

sys.setrecursionlimit(10_000)


def leaf(value: int) -> int:
    return value


def calls(n: int) -> tuple[float, float]:
    """Nanoseconds and page faults a call."""
    faults, start = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt, time.perf_counter()
    for _ in range(n):
        leaf(1)
    took = time.perf_counter() - start
    return 1e9 * took / n, (resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - faults) / n


def at_depth(depth: int, n: int) -> tuple[float, float]:
    return at_depth(depth - 1, n) if depth else calls(n)


def scan(depths: int, n: int) -> str:
    found = [at_depth(depth, n) for depth in range(depths)]
    median = statistics.median(ns for ns, _ in found)
    slowest, faults = max(found)
    return f"{median:.0f} | {slowest:.0f} | {faults:.2f} | {sum(ns > 20 * median for ns, _ in found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, default=600)
    parser.add_argument("--calls", type=int, default=20_000)
    args = parser.parse_args()
    print(f"{platform.machine()}, Linux {platform.release()}\n")
    print("| Python | frames | ns a call, median depth | slowest depth | page faults a call there | depths like that |")
    print("| --- | --- | --- | --- | --- | --- |")
    version = platform.python_version()
    print(f"| {version} | as they are | {scan(args.depths, args.calls)} |")
    print(f"| {version} | with room | {roomy(scan)(args.depths, args.calls)} |")


if __name__ == "__main__":
    main()
