"""Run as a script: greedy generation with ngram speculation by ``vllm.LLM`` in this process, all requests traced.

offline_speculative.py MODEL     prints JSON on the last line: sequences, what was scheduled, records, counters.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from moe_monitor.records import RecordReader
    from moe_monitor.snapshot import read_engines

    llm = LLM(
        sys.argv[1],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 2,
            "prompt_lookup_min": 1,
        },
    )
    reader = RecordReader(Path(os.environ["MOE_MONITOR_DIR"]))
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 300) for _ in range(n)] * 3 for n in (2, 5, 30, 11)]  # what repeats is drafted
    parameters = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    for _ in range(3):  # the end of the last requests reaches the worker with a step that has no tokens
        llm.llm_engine.engine_core.get_output()
    records, end = [], time.monotonic() + 10
    while len(records) < len(prompts) and time.monotonic() < end:
        time.sleep(0.1)
        records += reader.poll()
    (engine,) = read_engines(Path(os.environ["MOE_MONITOR_DIR"]))
    found = {
        r.meta.id.rsplit("-", 1)[0]: {"counts": r.counts.tolist(), "decode": r.column("decode").tolist()}
        for r in records
    }
    sequences = {o.request_id: [list(o.prompt_token_ids), list(o.outputs[0].token_ids)] for o in outputs}
    result = {
        "sequences": sequences,
        "records": found,
        "counts": engine.counts.tolist(),
        "status": engine.status.__dict__,
    }
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
