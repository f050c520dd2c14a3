"""What a Python hook sees and costs: a forward hook on every gate, as tools made for eager PyTorch attach it.

python_hook.py             both of the following, each in a process of its own
python_hook.py --graphs    torch.compile and CUDA graphs as vLLM runs: tokens that the hook sees of those computed
python_hook.py --eager     --enforce-eager: the same, and milliseconds per decode step without and with the hook
The monitor is off. The hook counts experts with the operations that such tools use: top-k and bincount on the device.
Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["MOE_MONITOR_ENABLED"] = "0"
sys.path.insert(0, str(Path(__file__).parent))

import models
import numpy as np


class Hooks:
    """Forward hooks on all gates of a model."""

    def __init__(self, model: Any, experts: int, top_k: int) -> None:
        self._gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
        self._experts, self._top_k = experts, top_k
        self._handles: list[Any] = []
        self.tokens = 0
        self.counts: dict[int, Any] = {}

    def attach(self) -> None:
        self._handles = [g.register_forward_hook(self._hook(i)) for i, g in enumerate(self._gates)]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Any:
        import torch

        def hook(module: Any, inputs: Any, output: Any) -> None:
            logits = output[0] if isinstance(output, tuple) else output
            if layer == 0:
                self.tokens += logits.shape[0]
            chosen = torch.topk(logits, self._top_k, dim=-1).indices
            counts = torch.bincount(chosen.flatten(), minlength=self._experts)
            self.counts[layer] = self.counts[layer] + counts if layer in self.counts else counts

        return hook


def measure(args: argparse.Namespace) -> None:
    import torch
    from vllm import LLM, SamplingParams

    config = models.FAMILIES[args.family]
    folder = models.write(Path("/tmp/bench-models") / args.family, args.family)
    options: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 256, "gpu_memory_utilization": args.memory}
    options["enable_prefix_caching"] = False
    options["kv_cache_memory_bytes"] = 1_000_000_000
    if args.eager:
        options["enforce_eager"] = True
    llm = LLM(str(folder), load_format="dummy", **options)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    hooks = Hooks(worker.model_runner.model, config["num_experts"], config["num_experts_per_tok"])
    draw = random.Random(2)

    def generate(batch: int, tokens: int) -> float:
        """Seconds for ``batch`` requests of 8 prompt tokens and ``tokens`` output tokens."""
        prompts = [
            {"prompt_token_ids": [draw.randrange(config["vocab_size"] - 100) for _ in range(8)]} for _ in range(batch)
        ]
        start = time.perf_counter()
        parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        llm.generate(prompts, parameters, use_tqdm=False)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    mode = "eager" if args.eager else "graphs"
    generate(4, 8)
    hooks.attach()
    generate(8, 33)
    hooks.detach()
    computed = 8 * (8 + 32)
    print("HOOK " + json.dumps({"mode": mode, "tokens_computed": computed, "tokens_seen": hooks.tokens}), flush=True)
    for batch in [int(b) for b in args.batches.split(",")]:
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(args.rounds + 1):
            for hooked in (False, True) if turn % 2 else (True, False):
                if hooked:
                    hooks.attach()
                # the difference of a long and a short run leaves the steps alone: no prefill, no set-up
                long = generate(batch, 8 + args.steps)
                short = generate(batch, 8)
                if hooked:
                    hooks.detach()
                if turn:
                    times[hooked].append(1000 * (long - short) / args.steps)
        ratios = np.array(times[True]) / np.array(times[False])
        line = {
            "mode": mode,
            "batch": batch,
            "step_ms_without_hook": round(statistics.median(times[False]), 3),
            "step_ms_with_hook": round(statistics.median(times[True]), 3),
            "ratio": round(float(np.median(ratios)), 4),
            "ratio_range": [round(float(ratios.min()), 4), round(float(ratios.max()), 4)],
            "rounds": len(ratios),
        }
        print("HOOK " + json.dumps(line), flush=True)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--family", default="olmoe")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=float, default=0.5)
    args = parser.parse_args()
    if args.graphs or args.eager:
        measure(args)
        return
    for mode in ("--graphs", "--eager"):
        subprocess.run([sys.executable, __file__, mode, *sys.argv[1:]], timeout=280, check=True)


if __name__ == "__main__":
    main()
