"""Start-up cost and host time per step on a CPU: offline ``LLM`` in fresh processes, with and without, alternating.

cpu_overhead.py [--pairs 5] [--layers 16]   A tiny OLMoE (64 experts, top-8), eager. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

RUN = """
import json, os, random, sys, time
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
start = time.perf_counter()
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=32)
ready = time.perf_counter() - start
draw = random.Random(3)
prompts = [{"prompt_token_ids": [draw.randrange(3, 300) for _ in range(64)]} for _ in range(32)]
parameters = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
llm.generate(prompts, parameters, use_tqdm=False)
def snapshot():
    from moe_monitor.capture.vllm.runners import SENTINEL
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    capture = getattr(runner, SENTINEL, None)
    return (capture.fuse.status.hook_seconds, capture.passes) if capture else (0.0, 0)
before, took = snapshot(), []
for _ in range(3):
    begin = time.perf_counter()
    llm.generate(prompts, parameters, use_tqdm=False)
    took.append(time.perf_counter() - begin)
after = snapshot()
passes = after[1] - before[1]
hook_us = 1e6 * (after[0] - before[0]) / passes if passes else 0
print(json.dumps({"ready": ready, "seconds": min(took), "hook_us": hook_us}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=16)
    args = parser.parse_args()
    import models

    with tempfile.TemporaryDirectory() as scratch:
        model = models.olmoe(Path(scratch) / "model", layers=args.layers)
        results: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for pair in range(args.pairs + 1):
            for on in (True, False) if pair % 2 else (False, True):
                env = os.environ | {"MOE_MONITOR_ENABLED": str(int(on)), "MOE_MONITOR_DIR": f"{scratch}/run"}
                env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
                command = [sys.executable, "-c", RUN, str(model)]
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                if pair:  # the first pair fills the disk cache
                    results[on].append(json.loads(done.stdout.splitlines()[-1]))

    def median(on: bool, key: str) -> float:
        return statistics.median(r[key] for r in results[on])

    def spread(on: bool, key: str) -> str:
        values = [r[key] for r in results[on]]
        return f"{min(values):.2f} to {max(values):.2f}"

    versions = ", ".join(f"{p} {version(p)}" for p in ("vllm-cpu", "torch", "moe-monitor"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}; ", end="")
    print(f"{args.layers} layers, 64 experts, top-8, float32, eager, 32 requests of 64 + 64 tokens, ", end="")
    print(f"{args.pairs} pairs\n")
    print("| | without | with |\n| --- | --- | --- |")
    for key, name in (("ready", "start-up, s"), ("seconds", "32 requests, s")):
        cells = [f"{median(on, key):.2f} ({spread(on, key)})" for on in (False, True)]
        print(f"| {name}, median (range) | {cells[0]} | {cells[1]} |")
    print(f"| host time in hooks per pass, us | | {median(True, 'hook_us'):.0f} |")


if __name__ == "__main__":
    main()
