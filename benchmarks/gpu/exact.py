"""Exactness on a real GPU: the monitor's rows against the in-graph shadow, over mixed traffic.

exact.py [--family olmoe] [--rounds N] [--replay] [--prefill] [--off] [--adapters N] [--sleep]
Environment: VLLM_USE_V2_MODEL_RUNNER, MOE_MONITOR_CAPTURE. Prints a line RESULT of JSON. ``--replay``: also GPU time of
graph replays with and without the monitor's kernel, in the same process, with no, some and all rows traced.
``--prefill``: GPU time of a pass of max_num_batched_tokens tokens (``--option max_num_batched_tokens=8192``), likewise.
``--adapters``: requests take turns with so many LoRA adapters, on attention and experts, and none. ``--sleep``: after
a round the engine sleeps at level 1 and wakes up, after the next at level 2, and gets other weights.
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
os.environ.setdefault("MOE_MONITOR_DIR", "/tmp/moe-monitor-bench")
sys.path.insert(0, str(Path(__file__).parent))

import llm_options
import models
import numpy as np
import shadow


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", default="olmoe")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--prefill", action="store_true")
    parser.add_argument("--no-shadow", action="store_true")
    parser.add_argument("--replay-rounds", type=int, default=11)
    parser.add_argument("--prefill-rounds", type=int, default=14)
    parser.add_argument("--sizes", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--long", action="store_true", help="long prompts only: many tokens in little time")
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--sleep", action="store_true")
    parser.add_argument("--off", action="store_true", help="without the monitor: plain replay times")
    parser.add_argument("--limit-s", type=int, default=570, help="ends the process, whatever it does")
    llm_options.add_to(parser)
    return parser.parse_args()


def routers_that_choose(model, seed: int = 5) -> None:
    """Dummy weights give logits that are all ties; give norms unit weight and gates logits of about unit variance."""
    import torch

    torch.manual_seed(seed)
    for full_name, parameter in model.named_parameters():
        name = full_name.replace(".base_layer", "")  # what LoRA puts around a layer
        if "norm" in name and parameter.ndim == 1:
            parameter.data.fill_(1)
        elif name.endswith(("gate.weight", "router.weight")) and parameter.ndim == 2:  # CPUs pack it
            parameter.data.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
        elif name.endswith("embed_tokens.weight"):
            parameter.data.normal_(0, 1)


def lora_requests(args: argparse.Namespace) -> list[Any]:
    """What the requests take turns with; None is no adapter."""
    if not args.adapters:
        return [None]
    import adapters
    from vllm.lora.request import LoRARequest

    folder, config = Path("/tmp/bench-models") / f"{args.family}-adapters", models.FAMILIES[args.family]
    numbers = range(1, args.adapters + 1)
    return [None, *(LoRARequest(f"a{n}", n, str(adapters.write(folder / str(n), config, n))) for n in numbers)]


def sleep(llm: Any, model: Any, level: int) -> None:
    """And wake up, after a while: threads of the monitor's go on meanwhile. Level 2 forgets the weights."""
    import torch
    from vllm.model_executor.model_loader.weight_utils import initialize_dummy_weights

    before = torch.cuda.mem_get_info()[0]
    llm.sleep(level=level)
    freed = torch.cuda.mem_get_info()[0] - before
    time.sleep(3)
    llm.wake_up()
    if level == 2:
        with torch.inference_mode():
            initialize_dummy_weights(model, llm.model_config)
            routers_that_choose(model, seed=6)
    print(f"SLEEP level {level}: {freed >> 20} MiB were free meanwhile", flush=True)


def graph_pool_mib() -> float:
    """Device memory of the pools that CUDA graphs allocate from."""
    import torch

    segments = torch.cuda.memory_snapshot()
    return round(sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0)) / 2**20, 1)


def main() -> None:
    args = parse()
    sizes = [int(n) for n in args.sizes.split(",")]
    signal.signal(signal.SIGALRM, lambda *_: print("LIMIT reached, nothing more to come", flush=True) or os._exit(2))
    signal.alarm(args.limit_s)
    start = time.time()
    if not args.no_shadow:
        shadow.install("sigmoid" if args.family == "deepseek" else "softmax")
    from vllm import LLM, SamplingParams

    from moe_monitor.capture.vllm import runners

    if args.replay and not args.off:
        import timing

        timing.keep_plain()

    attached = []
    patch_dummies = runners.patch_dummies
    runners.patch_dummies = lambda runner, capture: attached.append(runner) or patch_dummies(runner, capture)
    folder = models.write(Path("/tmp/bench-models") / args.family, args.family)
    options = {"max_num_batched_tokens": 2048, "max_model_len": 4096, "max_num_seqs": 256}
    options |= {"gpu_memory_utilization": 0.5, "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]}
    if args.adapters:
        options |= {"enable_lora": True, "max_loras": args.adapters, "max_lora_rank": 8}
    if args.sleep:
        options["enable_sleep_mode"] = True
    options |= llm_options.parsed(args.option)
    llm = LLM(str(folder), load_format="dummy", **options)
    ready = time.time() - start
    if args.off:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    else:
        (runner,) = attached
    capture = getattr(runner, "_moe_monitor", None)
    routers_that_choose(runner.model)

    vocabulary = models.FAMILIES[args.family]["vocab_size"] - 100
    draw = random.Random(11)
    config = models.FAMILIES[args.family]
    experts = next(config[k] for k in ("num_experts", "n_routed_experts", "num_local_experts") if k in config)
    routed = np.zeros((config["num_hidden_layers"], experts), dtype=np.int64)
    turns = lora_requests(args)
    for turn in range(args.rounds):
        if args.sleep and turn:
            sleep(llm, runner.model, level=min(turn, 2))
        shared = [draw.randrange(vocabulary) for _ in range(200)]
        prompts = []
        for i in range(args.requests):
            lengths = [2500, 3700] if args.long else [1, 7, 40, 300, 1100, 2500]
            tail = [draw.randrange(vocabulary) for _ in range(draw.choice(lengths))]
            prompts.append({"prompt_token_ids": (shared + tail) if i % 3 == 0 else tail})
        parameters = [
            SamplingParams(max_tokens=draw.choice([1, 16, 90]), temperature=0, ignore_eos=True) for _ in prompts
        ]
        loras = [turns[i % len(turns)] for i in range(len(prompts))]
        for output in llm.generate(prompts, parameters, use_tqdm=False, lora_request=loras):
            ids = output.outputs[0].routed_experts
            if ids is not None:  # vLLM's own capture, of all positions: those from the prefix cache were not computed
                own = ids[output.num_cached_tokens or 0 :]
                for layer in range(own.shape[1]):
                    routed[layer] += np.bincount(own[:, layer].ravel(), minlength=routed.shape[1])
    import torch

    torch.cuda.synchronize()
    if args.off:
        import timing

        print("OFF " + json.dumps({"options": args.option, "graph_pool_mib": graph_pool_mib()}), flush=True)

        for line in timing.replays(runner, None, args.replay_rounds, sizes=sizes):
            print("REPLAY " + json.dumps(line), flush=True)
        os._exit(0)
    reading = capture.read()
    result = {
        "family": args.family,
        "options": args.option,
        "runner": type(runner).__module__.rsplit(".", 2)[-2],
        "capture": capture.fuse.status.capture,
        "active": capture.fuse.status.active,
        "reason": capture.fuse.status.reason,
        "errors": capture.fuse.status.errors,
        "ready_s": round(ready, 1),
        "graph_pool_mib": None if args.sleep else graph_pool_mib(),  # weights are in such a pool, too
        "passes": reading.passes,
        "host_us_per_pass": round(1e6 * capture.fuse.status.hook_seconds / max(1, reading.passes), 1),
    }
    if capture.meter is not None:
        graphs = capture.meter.graphs.found.values()
        result["graphs"], result["sealed"] = len(graphs), sum(graph.sealed for graph in graphs)
        box = capture.meter.graphs.mailbox
        if box is not None:  # what was posted, and what the device has begun: the same, now that it has worked it off
            result["posted"], result["begun"] = box.posted, box.begun[0]
        layout = capture.meter.layout
        result["tokens"] = int(layout.column(reading.rows, "tokens").max())
        result["retained_mib"] = round(capture.meter.graphs.retained_bytes / 2**20, 1)
        entropy = layout.column(reading.rows, "entropy_sum").sum() / 2**20 / layout.column(reading.rows, "tokens").sum()
        result["entropy"] = round(float(entropy), 4)
        if not args.no_shadow:
            result["shadow_tokens"] = shadow.TOKENS
            result["largest_difference"] = {k: v for k, v in shadow.compare(reading.rows, layout).items() if v}
    if routed.any():
        result["vllm_capture_difference"] = int(np.abs(routed - layout.column(reading.rows, "experts")).max())
    runner.shadow_off = True
    print("RESULT " + json.dumps(result), flush=True)
    if args.replay:
        import timing

        lines = []
        for line in timing.replays(runner, capture, args.replay_rounds, sizes=sizes):
            lines.append(line)
            print("REPLAY " + json.dumps(line), flush=True)
        print("REPLAY_MEANS " + json.dumps(timing.geometric_means(lines)), flush=True)
    if args.prefill:
        import timing

        for line in timing.prefill(llm, runner, capture, vocabulary, args.prefill_rounds):
            print("PREFILL " + json.dumps(line), flush=True)
    capture.close()
    os._exit(0)


if __name__ == "__main__":
    main()
