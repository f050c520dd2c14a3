#!/usr/bin/env python3
"""What the monitor costs a transformers forward pass, next to plain forward hooks that copy to the host per layer.

    python benchmarks/transformers_overhead.py                               # CPU: a smaller model, one thread
    python benchmarks/transformers_overhead.py --shape narrow --tokens 1 --clock cpu --passes 10  # host work only
    python benchmarks/transformers_overhead.py --device cuda --shape olmoe   # GPU: OLMoE-1B-7B's shape, bfloat16
    python benchmarks/transformers_overhead.py --device cuda --shape olmoe --compile default
    python benchmarks/transformers_overhead.py --device cuda --shape olmoe --compile reduce-overhead

Every variant runs once in each round, in an order drawn anew for each round, in one process and on one model; the
figure is the median over rounds of the ratio to the bare model in the same round, with its 95 % bootstrap interval.
Time is wall time of ``--passes`` forward passes without cache, the device waited for at both ends; with ``--clock cpu``
processor time of this process, which others on the machine disturb less. ``added`` is the median difference to the bare
model in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import OlmoeConfig, OlmoeForCausalLM

from moe_monitor import __version__
from moe_monitor.capture.transformers import monitor

SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 16, "num_attention_heads": 8},
    "olmoe": {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16},
    "narrow": {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 16, "num_attention_heads": 4},
    "tiny": {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}


@contextmanager
def plain_hooks(model: torch.nn.Module, experts: int):
    """What tools of this kind usually do: a forward hook per router that brings its figures to the host at once."""
    seen = []

    def hook(module, args, output) -> None:
        logits = (output[0] if isinstance(output, tuple) else output).detach().float()
        p = torch.softmax(logits, dim=-1)
        top, ids = torch.topk(p, 8, dim=-1)
        entropy = -(p * p.clamp(min=1e-12).log()).sum(-1)
        counts = torch.bincount(ids.reshape(-1), minlength=experts)
        seen.append((counts.cpu(), entropy.cpu(), top.cpu()))
        if len(seen) > 1000:
            seen.clear()

    handles = [layer.mlp.gate.register_forward_hook(hook) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def variants(
    model: torch.nn.Module, run: torch.nn.Module, compiled: bool
) -> dict[str, Callable[[], AbstractContextManager]]:
    experts = model.config.num_experts
    sessions = {
        "monitor": monitor(run),
        "monitor, latency off": monitor(run, latency=False),
        "monitor, record": monitor(run, latency=False, record=True, record_limit=256 << 20),
    }
    known: dict[str, Callable[[], AbstractContextManager]] = {"bare": nullcontext}
    if compiled:  # nothing is timed inside compiled code, and CUDA graphs cannot record
        return known | {"monitor": lambda: sessions["monitor"]}
    known |= {name: (lambda s=session: s) for name, session in sessions.items()}
    return known | {"plain hooks with .cpu()": lambda: plain_hooks(model, experts)}


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def once(run: torch.nn.Module, ids: torch.Tensor, passes: int, clock: str = "wall") -> float:
    now = CLOCKS[clock]
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = now()
    for _ in range(passes):
        run(input_ids=ids, use_cache=False)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return (now() - start) / passes


def interval(ratios: np.ndarray) -> dict[str, float]:
    """Median of ratios [rounds] and its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}


def measure(
    model, run, ids: torch.Tensor, rounds: int, passes: int, compiled: bool, clock: str
) -> dict[str, dict[str, float]]:
    makers = variants(model, run, compiled)
    times: dict[str, list[float]] = {name: [] for name in makers}
    order = list(makers)
    for turn in range(rounds + 1):
        random.shuffle(order)
        for name in order:
            with makers[name]() as session:
                if turn == 0:
                    once(run, ids, 3)  # compiles, warms up
                seconds = once(run, ids, passes, clock)
                if getattr(session, "off", False):
                    raise SystemExit(f"{name}: {session.reason}")
            if hasattr(session, "reset"):
                session.reset()
            if turn:
                times[name].append(seconds)
    bare = np.array(times["bare"])
    return {
        n: {"seconds": float(np.median(v)), "added": float(np.median(np.array(v) - bare))}
        | interval(np.array(v) / bare)
        for n, v in times.items()
    }


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 64, 512], help="tokens per pass, one sequence")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--passes", type=int, default=0, help="forward passes per figure; default by tokens")
    parser.add_argument("--compile", choices=("no", "default", "reduce-overhead"), default="no")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(arguments.device):
        config = OlmoeConfig(vocab_size=1024, pad_token_id=0, eos_token_id=1, **SHAPES[arguments.shape])
        model = OlmoeForCausalLM(config).to(dtype).eval()
    compiled = arguments.compile != "no"
    run = (
        torch.compile(model, mode=None if arguments.compile == "default" else arguments.compile) if compiled else model
    )
    made = {
        "command": "python " + " ".join(sys.argv),
        "device": processor(arguments.device),
        "dtype": str(dtype).removeprefix("torch."),
        "shape": SHAPES[arguments.shape] | {"num_experts": 64, "num_experts_per_tok": 8},
        "compile": arguments.compile,
        "rounds": arguments.rounds,
        "clock": arguments.clock,
        "versions": {
            "moe-monitor": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "results": {},
    }
    print(json.dumps({k: v for k, v in made.items() if k != "results"}, indent=1))
    print(
        "\n| tokens per pass | variant | ms per pass | added, ms | ratio to bare | 95 % interval |"
        "\n|---|---|---|---|---|---|"
    )
    with torch.inference_mode():
        for tokens in arguments.tokens:
            ids = torch.randint(2, 1024, (1, tokens), device=arguments.device)
            passes = arguments.passes or (3 if arguments.device == "cpu" else 20)
            found = measure(model, run, ids, arguments.rounds, passes, compiled, arguments.clock)
            made["results"][str(tokens)] = found
            for name, r in found.items():
                interval = "" if name == "bare" else f"{r['low']:.3f} to {r['high']:.3f}"
                times = f"{1e3 * r['seconds']:.2f} | {1e3 * r['added']:.2f}"
                print(f"| {tokens} | {name} | {times} | {r['ratio']:.3f} | {interval} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
