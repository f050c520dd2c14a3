"""Tiny models for tests: real architectures, random weights, a byte tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 300
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 2,  # vLLM's CPU attention needs heads of at least 32
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def tokenizer(path: Path) -> None:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    made = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    wrapped.save_pretrained(path)


def olmoe(path: Path, layers: int = 4, experts: int = 64, top_k: int = 8) -> Path:
    """OLMoE with routers of different sharpness by layer."""
    torch.manual_seed(20240902)
    config = OlmoeConfig(
        **SHAPE, num_hidden_layers=layers, num_experts=experts, num_experts_per_tok=top_k, norm_topk_prob=False
    )
    model = OlmoeForCausalLM(config)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.mlp.gate.weight.normal_(0, (0.1, 0.3, 0.6, 1.0)[i % 4])
    model.to(torch.float32).save_pretrained(path)
    tokenizer(path)
    return path


def dense(path: Path) -> Path:
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2)).to(torch.float32).save_pretrained(path)
    tokenizer(path)
    return path
