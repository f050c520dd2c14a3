"""Run as a script: greedy generation with ``vllm.LLM`` in this process, results as JSON on the last line.

offline.py MODEL [eager|compiled] [PLANT]   PLANT: a file to create before the second round, see injected/
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path


def main() -> None:
    model, mode, *plant = sys.argv[1:]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=mode == "eager",
        max_model_len=512,
        max_num_batched_tokens=128,
        max_num_seqs=8,
    )
    ready = time.perf_counter() - start
    draw = random.Random(3)
    prompts = [{"prompt_token_ids": [draw.randrange(3, 300) for _ in range(n)]} for n in (5, 40, 150, 33, 200, 12)]
    parameters = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    rounds = []
    for i in range(2):
        if i and plant:
            Path(plant[0]).touch()
        rounds.append([list(o.outputs[0].token_ids) for o in llm.generate(prompts, parameters, use_tqdm=False)])
    time.sleep(1.5)  # more than one publishing interval
    engines = []
    if "MOE_MONITOR_DIR" in os.environ and Path(os.environ["MOE_MONITOR_DIR"]).is_dir():
        from moe_monitor.snapshot import read_engines

        for e in read_engines(Path(os.environ["MOE_MONITOR_DIR"])):
            counts = e.counts.tolist() if e.layers else []
            facts = {"counts": counts, "passes": e.passes, "status": e.status.__dict__, "identity": e.identity}
            timed = e.latency.arrays["layer"].sum(axis=(2, 3)).tolist() if e.latency is not None else None
            engines.append(facts | {"timed": timed})
    patched = sorted(m for m in sys.modules if m.startswith("moe_monitor.capture"))
    prompts_ids = [p["prompt_token_ids"] for p in prompts]
    result = {"prompts": prompts_ids, "rounds": rounds, "engines": engines, "ready": ready, "modules": patched}
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
