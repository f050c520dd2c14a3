"""Offline inference with `LLM(...)`, and the routing read in Python afterwards.

    python examples/offline.py allenai/OLMoE-1B-7B-0924

The plugin runs as in a server; the counts are on the board that its worker publishes.
"""

from __future__ import annotations

import sys
import time

from moe_monitor import settings, statistics
from moe_monitor.snapshot import read_engines

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at",
]


def main(model: str) -> None:
    from vllm import LLM, SamplingParams

    configured = settings.load()
    llm = LLM(model, max_model_len=512, enforce_eager=True)
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=64))
    for output in outputs:
        print(repr(output.prompt), "->", repr(output.outputs[0].text[:60]))

    time.sleep(2 * configured.interval)  # the last step is published at most one interval later
    for engine in read_engines(configured.dir):
        if engine.model_name != model:
            continue
        print(f"\n{engine.model_name}: {engine.passes} forward passes, monitor active: {engine.status.active}")
        imbalance = statistics.imbalance(engine.counts)
        for layer, tokens, counts, ratio in zip(
            engine.layers, engine.column("tokens"), engine.counts, imbalance, strict=True
        ):
            floor = statistics.imbalance_floor(int(tokens), len(counts), engine.top_k)
            print(f"layer {layer:3}: {tokens} tokens, imbalance {ratio:.2f} (by chance {floor:.2f}), "
                  f"hottest expert {counts.argmax()}")  # fmt: skip


if __name__ == "__main__":  # vLLM starts its workers by importing this file again
    main(sys.argv[1] if len(sys.argv) > 1 else "allenai/OLMoE-1B-7B-0924")
