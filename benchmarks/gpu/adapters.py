"""LoRA adapters with random weights, for the attention and every expert of a model that ``models.py`` describes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

RANK = 4
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_EXPERT = ("gate_proj", "up_proj", "down_proj")


def write(folder: Path, config: dict[str, Any], number: int) -> Path:
    """The folder of adapter ``number``, in the format of the peft library. Its weights keep the size of what they are
    given; the same number gives the same ones.
    """
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(number)
    tensors = {}
    for name, inputs, outputs in _projections(config):
        for half, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            weight = torch.randn(shape, generator=draw) / shape[1] ** 0.5
            tensors[f"base_model.model.model.{name}.lora_{half}.weight"] = weight.to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    adapter["target_modules"] = [*_ATTENTION, *_EXPERT]
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return folder


def _projections(config: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(name, inputs, outputs) of what an adapter changes."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim", hidden // heads)
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    key_value = config["num_key_value_heads"] * head
    attention = ((hidden, heads * head), (hidden, key_value), (hidden, key_value), (heads * head, hidden))
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in zip(_ATTENTION, attention, strict=True):
            yield f"layers.{layer}.self_attn.{name}", inputs, outputs
        for expert in range(config["num_experts"]):
            for name in _EXPERT:
                sizes = (inner, hidden) if name == "down_proj" else (hidden, inner)
                yield f"layers.{layer}.mlp.experts.{expert}.{name}", *sizes
