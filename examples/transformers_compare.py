#!/usr/bin/env python3
"""Compare two texts on one model, and one model before and after quantisation. Writes an HTML report.

    python examples/transformers_compare.py                                  # tiny random model, needs no download
    python examples/transformers_compare.py --model allenai/OLMoE-1B-7B-0924 --text a.txt --text b.txt --bits 4

Needs: pip install "moe-monitor[transformers]"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from moe_monitor.analysis import Record, Summary, compare, compare_choices
from moe_monitor.capture.transformers import monitor

PROSE = "The river was low that summer, and the boats lay on the mud until the evening tide came in. "
CODE = "for (int i = 0; i < n; ++i) { if (a[i] > best) { best = a[i]; where = i; } }\n"


def tiny() -> OlmoeForCausalLM:
    """An OLMoE of toy size with random weights; its tokens are bytes."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    experts = {"num_experts": 32, "num_experts_per_tok": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1}
    config = OlmoeConfig(
        vocab_size=256, max_position_embeddings=512, initializer_range=0.2, **shape, **experts, **special
    )
    return OlmoeForCausalLM(config).eval()


def sequences(text: str, tokenizer: Any, length: int) -> list[list[int]]:
    """The text as token ids, cut into pieces of equal length; bytes where there is no tokenizer."""
    ids = list(text.encode()) if tokenizer is None else tokenizer(text)["input_ids"]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def run(model: Any, pieces: Iterable[list[int]], name: str) -> tuple[Summary, Record]:
    """Feed every piece through the model and return what was seen."""
    with monitor(model, record=True, model_name=name) as m, torch.inference_mode():
        for piece in pieces:
            model(input_ids=torch.tensor([piece], device=model.device), use_cache=False)
    if m.off:
        raise SystemExit(f"the monitor switched itself off: {m.reason}")
    return m.summary(), m.record()


def quantise(model: Any, bits: int) -> None:
    """Round every matrix but embeddings and routers to ``bits`` bits per output channel, in place (simulated)."""
    highest = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2 or any(part in name for part in ("embed", "lm_head", ".gate.", ".router.")):
                continue
            scale = (weight.abs().amax(dim=-1, keepdim=True) / highest).clamp(min=1e-12)
            weight.copy_((weight / scale).round() * scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder; default: a tiny random OLMoE")
    parser.add_argument("--text", type=Path, action="append", default=[], help="a text file; give two")
    parser.add_argument("--bits", type=int, default=4, help="bits of the quantised weights (default 4)")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence (default 64)")
    parser.add_argument("--out", type=Path, default=Path("routing.html"), help="where the report goes")
    arguments = parser.parse_args()
    if len(arguments.text) not in {0, 2}:
        parser.error("give --text twice, or not at all")
    if arguments.model:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto").eval()
    else:
        tokenizer, model = None, tiny()
    texts = [path.read_text() for path in arguments.text] or [PROSE * 25, CODE * 30]

    pieces = [sequences(text, tokenizer, arguments.length) for text in texts]
    (summary, first), (_, second) = (run(model, part, arguments.model or "tiny OLMoE") for part in pieces)
    summary.print()
    by_text = compare(first, second)
    print(f"\nTwo texts: {by_text}")

    quantise(model, arguments.bits)
    _, after = run(model, pieces[0], "quantised")
    by_build = compare_choices(first, after)
    print(f"Before and after quantisation to {arguments.bits} bits: {by_build}")

    named = {"two texts": by_text, f"full precision and {arguments.bits} bits, same tokens": by_build}
    summary.to_html(arguments.out, comparisons=named)
    print(f"Report: {arguments.out.resolve()}")


if __name__ == "__main__":
    main()
