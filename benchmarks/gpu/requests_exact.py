"""Traced requests on a real GPU: what each is said to have routed, against two oracles.

requests_exact.py [--family olmoe] [--requests 120] [--speculate] [--option NAME=JSON]
Environment: VLLM_USE_V2_MODEL_RUNNER=1 for the V2 runner, which cannot return vLLM's own routed_experts in 0.26.

Every request is traced. Oracles: (1) vLLM's own ``routed_experts`` (V1 without speculation), for sequences that were
not preempted: it tells a position once, also where the position was computed again; (2) the in-graph shadow, its rows
given to requests by the scheduler's and the model runner's own batch, for all. Traffic: chunked prefill (512 tokens a
step, prompts up to 1,800), shared prefixes, a KV cache too small for what runs (preemption), n = 3; with --speculate,
ngram drafts over repetitive prompts. The sum over requests must be the counters. Prints one JSON line and ends with 1
when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("MOE_MONITOR_DIR", f"/tmp/moe-monitor-requests-{os.getpid()}")
os.environ |= {"MOE_MONITOR_SAMPLE_RATIO": "1", "MOE_MONITOR_MAX_TRACED": "1024", "MOE_MONITOR_INTERVAL": "0.05"}
os.environ |= {"MOE_MONITOR_DEVICE_MEMORY_MIB": "512"}
sys.path.insert(0, str(Path(__file__).parent))

import llm_options
import models
import numpy as np
import shadow
from exact import routers_that_choose

#: Sequences by the engine's id: counts [layers, experts] of the shadow, and tokens that were computed.
BY_REQUEST: dict[str, np.ndarray] = {}
COMPUTED: dict[str, int] = {}
EXPERTS = 0


def attribute(runner: Any, scheduled: Any) -> None:
    """Give the rows of the step that has run to requests; called by the shadow after each real step."""
    state = getattr(runner, "execute_model_state", None)
    batch = getattr(state, "input_batch", None) or runner.input_batch  # V2's belongs to the step, V1's to the runner
    ids = list(batch.req_ids)
    if hasattr(batch, "query_start_loc_np"):
        bounds = [int(x) for x in batch.query_start_loc_np[: len(ids) + 1]]
    else:
        bounds = [0, *np.cumsum([scheduled.num_scheduled_tokens[i] for i in ids]).tolist()]
    chosen = shadow.chosen(bounds[-1])
    for name, first, last in zip(ids, bounds[:-1], bounds[1:], strict=True):
        if last == first:
            continue
        counts = BY_REQUEST.setdefault(name, np.zeros((len(chosen), EXPERTS), dtype=np.int64))
        for layer, layer_ids in enumerate(chosen):
            counts[layer] += np.bincount(layer_ids[first:last].ravel(), minlength=EXPERTS)
        COMPUTED[name] = COMPUTED.get(name, 0) + last - first


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="olmoe")
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--blocks", type=int, default=640, help="KV cache, blocks of 16 tokens: small, to preempt")
    parser.add_argument("--speculate", action="store_true")
    parser.add_argument("--shadow-only", action="store_true", help="where vLLM cannot return routed_experts")
    parser.add_argument("--limit-s", type=int, default=570, help="ends the process, whatever it does")
    llm_options.add_to(parser)
    return parser.parse_args()


def traffic(args: argparse.Namespace, vocabulary: int) -> tuple[list[dict[str, list[int]]], list[dict[str, Any]]]:
    draw = random.Random(17)
    prefix = [draw.randrange(vocabulary) for _ in range(200)]
    prompts, options = [], []
    for i in range(args.requests):
        tail = [draw.randrange(vocabulary) for _ in range(draw.choice([1, 5, 40, 150, 600, 1600]))]
        if args.speculate:
            tail = (tail[:20] * 40)[: max(40, len(tail))]  # repeats itself, so that drafts are found
        prompts.append({"prompt_token_ids": prefix + tail if i % 3 == 0 else tail})
        several = {"n": 3, "temperature": 1.0} if i % 10 == 1 else {"temperature": 0.0}
        options.append({"max_tokens": draw.choice([1, 30, 200]), "ignore_eos": True, **several})
    return prompts, options


def main() -> None:
    global EXPERTS
    args = parse()
    start = time.monotonic()
    signal.signal(signal.SIGALRM, lambda *_: print("LIMIT reached, nothing more to come", flush=True) or os._exit(2))
    signal.alarm(args.limit_s)
    shadow.install("sigmoid" if args.family == "deepseek" else "softmax", after=attribute)
    from vllm import LLM, SamplingParams

    from moe_monitor.capture.vllm import runners

    attached = []
    patch_dummies = runners.patch_dummies
    runners.patch_dummies = lambda runner, capture: attached.append(runner) or patch_dummies(runner, capture)
    config = models.FAMILIES[args.family]
    EXPERTS = next(config[k] for k in ("num_experts", "n_routed_experts", "num_local_experts") if k in config)
    v2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "") == "1"
    own = not v2 and not args.speculate and not args.shadow_only
    options: dict[str, Any] = {"max_num_batched_tokens": 512, "max_model_len": 2048, "max_num_seqs": 64}
    options |= {"gpu_memory_utilization": 0.5, "num_gpu_blocks_override": args.blocks, "block_size": 16}
    options |= {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]}
    if own:
        options["enable_return_routed_experts"] = True
    if args.speculate:
        options["speculative_config"] = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    options |= llm_options.parsed(args.option)
    llm = LLM(str(models.write(Path("/tmp/bench-models") / args.family, args.family)), load_format="dummy", **options)
    ready = time.monotonic() - start
    (runner,) = attached
    capture = runner._moe_monitor
    routers_that_choose(runner.model)

    tallies = []
    drain = capture.tracer.drain

    def keep(limit: int) -> list[Any]:
        done = drain(limit)
        tallies.extend(done)
        return done

    capture.tracer.drain = keep

    prompts, parameters = traffic(args, config["vocab_size"] - 100)
    outputs = llm.generate(prompts, [SamplingParams(**p) for p in parameters], use_tqdm=False)
    for _ in range(4):  # the end of the last requests reaches the worker with a step that has no tokens
        llm.llm_engine.engine_core.get_output()
    wanted = len(BY_REQUEST)
    end = time.monotonic() + 10
    while len(tallies) < wanted and time.monotonic() < end:
        time.sleep(0.1)
    reading = capture.read()

    found = {tally.meta.id: tally for tally in tallies}
    totals = sum((t.counts.sum(axis=1, dtype=np.int64) for t in tallies), np.zeros(()))
    layout = capture.meter.layout
    shadow_bad = {n for n, c in BY_REQUEST.items() if n not in found or (found[n].counts.sum(axis=1) != c).any()}
    tokens_bad = {
        n
        for n, computed in COMPUTED.items()
        if n in found and (found[n].stats[:, 0] + found[n].stats[:, 1] != computed).any()
    }
    compared = worst = 0
    if own:
        for output in outputs:
            for completion in output.outputs:
                if completion.routed_experts is None:
                    continue
                name = _engine_id(found, output.request_id, completion.index, len(output.outputs))
                tally = found.get(name)
                if tally is None or tally.meta.preemptions:
                    continue
                ids = np.asarray(completion.routed_experts)[tally.meta.cached_tokens :]
                theirs = np.stack([np.bincount(ids[:, k].ravel(), minlength=EXPERTS) for k in range(ids.shape[1])])
                worst = max(worst, int(np.abs(tally.counts.sum(axis=1) - theirs).max()))
                compared += 1
    sums = layout.column(reading.rows, "experts")
    result = {
        "family": args.family,
        "runner": type(runner).__module__.rsplit(".", 2)[-2],
        "capture": capture.fuse.status.capture,
        "sealed": [sum(g.sealed for g in capture.meter.graphs.found.values()), len(capture.meter.graphs.found)],
        "active": capture.fuse.status.active,
        "reason": capture.fuse.status.reason,
        "options": args.option + ["speculate"] * args.speculate,
        "ready_s": round(ready, 1),
        "sequences": wanted,
        "records": len(tallies),
        "tokens": int(layout.column(reading.rows, "tokens").max()),
        "shadow_differs_for": len(shadow_bad),
        "token_numbers_differ_for": len(tokens_bad),
        "vllm_compared": compared,
        "vllm_largest_difference": worst if compared else None,
        "sum_minus_counters": int(np.abs(totals - sums).max()),
        "preempted_sequences": sum(t.meta.preemptions > 0 for t in tallies),
        "prefix_hits": sum(t.meta.cached_tokens > 0 for t in tallies),
        "several_sequences": sum(p.get("n", 1) > 1 for p in parameters),
        "dropped": dict(capture.fuse.status.dropped),
        "errors": dict(capture.fuse.status.errors),
        "s": round(time.monotonic() - start, 1),
    }
    good = not (shadow_bad or tokens_bad or worst or result["sum_minus_counters"] or result["dropped"])
    good = good and capture.fuse.status.active and (compared > 0 or not own)
    print("REQUESTS " + json.dumps({"ok": bool(good), **result}), flush=True)
    for name in sorted(shadow_bad)[:5]:
        mine = found[name].counts.sum(axis=1) if name in found else None
        told = None if mine is None else [int(mine.sum()), int(BY_REQUEST[name].sum())]
        print("DIFFERS " + json.dumps({"id": name, "tokens": COMPUTED[name], "routed_mine_shadow": told}), flush=True)
    capture.close()
    os._exit(0 if good else 1)


def _engine_id(found: dict[str, Any], request: str, index: int, n: int) -> str:
    """The engine's id of a sequence: "<index>_" in front where there are several, and a random suffix."""
    wanted = request if n == 1 else f"{index}_{request}"
    matching = [name for name in found if name == wanted or name.rsplit("-", 1)[0] == wanted]
    return matching[0] if len(matching) == 1 else ""


if __name__ == "__main__":
    main()
