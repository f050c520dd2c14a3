#!/usr/bin/env python3
"""How far vLLM's and transformers' routing agree for the same weights and tokens, in float32 and in bfloat16, and why.

    PYTHONPATH=. python benchmarks/transformers_bf16.py --json benchmarks/results/transformers_bf16.json

Two comparisons for each dtype, on the tiny OLMoE of ``tests/models.py`` (4 layers, 64 experts, top-8):

- served: a vLLM server under concurrent traffic; its counters against ``moe_monitor.expert_counts`` of the transformers
  model over the same sequences.
- decisions: one sequence at a time through ``vllm.LLM``, with the logits and ids of every decision, so that each
  difference can be laid to the logits (rounded differently) or to the choice (a tie broken differently).

Needs vLLM for CPUs. About four minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
DTYPES = ("float32", "bfloat16")
TOP_K = 8


def sequences(number: int, length: int) -> list[list[int]]:
    draw = random.Random(11)
    return [[draw.randrange(3, 300) for _ in range(length)] for _ in range(number)]


# in processes of their own


def run_vllm(model: str, dtype: str, out: str, number: int, length: int) -> None:
    """Logits float32 [decisions, layers, experts] and ids of every decision that vLLM makes, into ``out``."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from moe_monitor.capture.meter import Meter

    seen: dict[int, list[Any]] = {}
    observe = Meter.observe

    def spy(self: Meter, layer: int, logits: Any, ids: Any) -> None:
        if self.valid:
            n = self.valid
            seen.setdefault(layer, []).append((logits[:n].float().clone().numpy(), ids[:n].clone().numpy()))
        observe(self, layer, logits, ids)

    Meter.observe = spy  # type: ignore[method-assign]
    llm = LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )
    once = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for tokens in sequences(number, length):
        llm.generate([{"prompt_token_ids": tokens}], once, use_tqdm=False)
    logits = np.stack([np.concatenate([x for x, _ in seen[i]]) for i in sorted(seen)], axis=1)
    ids = np.stack([np.concatenate([x for _, x in seen[i]]) for i in sorted(seen)], axis=1)
    np.savez(out, logits=logits, ids=ids)


# comparing


def transformers_model(path: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()


def decisions(model: Any, batches: list[list[list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """(logits float32, ids) of every token, [tokens, layers, ...], by transformers' own output_router_logits."""
    import torch

    logits = []
    with torch.no_grad():
        for rows in batches:
            out = model(torch.tensor(rows), output_router_logits=True, use_cache=False)
            logits.append(torch.stack(list(out.router_logits), dim=1).float().numpy())
    found = np.concatenate(logits)
    return found, top_k(found)


def rounded_once(model: Any, texts: list[list[int]]) -> list[float]:
    """By layer: share of router logits that are the exact product of the router's own input, rounded once."""
    import torch

    equal: list[list[float]] = [[] for _ in model.model.layers]
    handles = []
    for at, layer in enumerate(model.model.layers):

        def hook(gate: Any, args: Any, out: Any, at: int = at) -> None:
            exact = (args[0].reshape(-1, args[0].shape[-1]).double() @ gate.weight.double().T).to(out[0].dtype)
            equal[at].append(float((exact == out[0]).double().mean()))

        handles.append(layer.mlp.gate.register_forward_hook(hook))
    with torch.no_grad():
        for tokens in texts:
            model(torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [float(np.mean(x)) for x in equal]


def top_k(logits: np.ndarray) -> np.ndarray:
    """The two steps of transformers' router on given logits: softmax in float32, torch.topk."""
    import torch

    return torch.softmax(torch.from_numpy(logits), -1).topk(TOP_K, dim=-1).indices.numpy()


def chosen(ids: np.ndarray, experts: int = 64) -> np.ndarray:
    result = np.zeros((*ids.shape[:2], experts), dtype=bool)
    np.put_along_axis(result, ids.astype(np.int64), values=True, axis=2)
    return result


def apart(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """How far two choices [tokens, layers, experts] differ."""
    moved = (a & ~b).sum(axis=2)
    return {
        "decisions": int(moved.size),
        "differing_decisions": int((moved > 0).sum()),
        "differing_by_layer": (moved > 0).sum(axis=0).tolist(),
        "differing_assignments": int(moved.sum()),
        "differing_counts": int(np.abs(a.sum(axis=0) - b.sum(axis=0)).sum() // 2),
    }


def spacing(logits: np.ndarray, dtype: str) -> np.ndarray:
    """Distance of neighbouring numbers of the dtype at each logit."""
    bits = 8 if dtype == "bfloat16" else 24
    return np.exp2(np.floor(np.log2(np.maximum(np.abs(logits), 1e-30))) - (bits - 1))


def boundary(logits: np.ndarray, dtype: str) -> np.ndarray:
    """Distance between the k-th and the next logit, in spacings of the k-th."""
    ranked = -np.sort(-logits, axis=2)
    return (ranked[..., TOP_K - 1] - ranked[..., TOP_K]) / spacing(ranked[..., TOP_K - 1], dtype)


def compare(path: str, dtype: str, found: Any, number: int, length: int) -> dict[str, Any]:
    texts = sequences(number, length)
    model = transformers_model(path, dtype)
    ours, ids = decisions(model, [[t] for t in texts])
    theirs = found["logits"]
    a, b = chosen(found["ids"]), chosen(ids)
    differ = (a != b).any(axis=2)
    by_choice = (chosen(top_k(theirs)) != a).any(axis=2)  # the same logits, and yet another choice
    gap, their_gap = boundary(ours, dtype), boundary(theirs, dtype)
    distance = np.abs(ours - theirs) / spacing(ours, dtype)
    _, batched_ids = decisions(model, [texts[i : i + 8] for i in range(0, number, 8)])
    result = {
        **apart(a, b),
        "of_these": {
            "vllm_chooses_otherwise_than_torch_topk_on_its_own_logits": int((differ & by_choice).sum()),
            "tied_in_transformers": int((differ & (gap == 0)).sum()),
            "tied_in_vllm": int((differ & (their_gap == 0)).sum()),
            "tied_in_both": int((differ & (gap == 0) & (their_gap == 0)).sum()),
            "boundary_gap_in_spacings_p50_p95_max": [float(x) for x in np.quantile(gap[differ], [0.5, 0.95, 1])]
            if differ.any()
            else None,
        },
        "choices_that_differ_on_vllms_own_logits": int(by_choice.sum()),
        "decisions_tied_at_the_boundary": {"transformers": int((gap == 0).sum()), "vllm": int((their_gap == 0).sum())},
        "logits": {
            "equal_to_the_bit_share_by_layer": (ours == theirs).mean(axis=(0, 2)).tolist(),
            "median_distance_in_spacings_by_layer": np.median(distance, axis=(0, 2)).tolist(),
            "p99_distance_in_spacings_by_layer": np.quantile(distance, 0.99, axis=(0, 2)).tolist(),
            "transformers_rounded_once_share_by_layer": rounded_once(model, texts),
            "largest_absolute_by_layer": np.abs(ours - theirs).max(axis=(0, 2)).tolist(),
        },
        "transformers_alone_batches_of_8_against_one_by_one": apart(chosen(batched_ids), b),
    }
    if dtype != "float32":
        _, exact = decisions(transformers_model(path, "float32"), [[t] for t in texts])
        result["transformers_alone_against_float32"] = apart(b, chosen(exact))
        result["vllm_against_transformers_float32"] = apart(a, chosen(exact))
    return result


def served(path: Path, dtype: str, folder: Path, requests: int) -> dict[str, Any]:
    from serving import eventually, only, select, serving

    from moe_monitor import expert_counts

    draw = random.Random(5)
    prompts = [[draw.randrange(3, 300) for _ in range(draw.randrange(16, 160))] for _ in range(requests)]
    with serving(path, folder, "--enforce-eager", "--max-model-len", "512", "--dtype", dtype) as server:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: server.complete(prompts[i], f"r{i}"), range(requests)))
        fed = [p + a["choices"][0]["token_ids"][:-1] for p, a in zip(prompts, answers, strict=True)]
        tokens = sum(map(len, fed))
        eventually(lambda: only(server.metrics(), "moe_routed_tokens_total", layer="3") >= tokens, 10)
        time.sleep(1)
        counts = np.zeros((4, 64), dtype=np.int64)
        for labels, value in select(server.metrics(), "moe_expert_tokens_total").items():
            at = dict(labels)
            counts[int(at["layer"]), int(at["expert"])] = int(value)
    expected = expert_counts(transformers_model(str(path), dtype), fed)
    moved = np.abs(counts - expected).sum(axis=1) // 2
    return {
        "tokens": tokens,
        "assignments": int(expected.sum()),
        "assignments_counted_by_vllm": int(counts.sum()),
        "differing_counts": int(moved.sum()),
        "differing_counts_by_layer": moved.tolist(),
        "imbalance_by_layer": {
            name: np.round(c.max(axis=1) / c.mean(axis=1), 3).tolist()
            for name, c in (("vllm", counts), ("transformers", expected))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only-vllm", nargs=3, metavar=("MODEL", "DTYPE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_vllm:
        run_vllm(*arguments.only_vllm, arguments.sequences, arguments.length)
        return
    import models
    import torch
    import transformers
    from vllm.version import __version__ as vllm_version

    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ":unknown")
    result: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "machine": f"{cpu.split(':')[1].strip()}, {os.cpu_count()} cores",
        "versions": {
            "vllm": vllm_version,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "model": "tests/models.py olmoe(): 4 layers, 64 experts, top-8, hidden 64, random weights",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = models.olmoe(folder / "model")
        for dtype in DTYPES:
            out = folder / f"{dtype}.npz"
            command = [sys.executable, __file__, "--only-vllm", str(path), dtype, str(out)]
            command += ["--sequences", str(arguments.sequences), "--length", str(arguments.length)]
            environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "MOE_MONITOR_DIR": str(folder / "boards"), **os.environ}
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            result[dtype] = {
                "served": served(path, dtype, folder / f"server-{dtype}", arguments.requests),
                "decisions": compare(str(path), dtype, np.load(out), arguments.sequences, arguments.length),
            }
            print(json.dumps({dtype: result[dtype]}, indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
