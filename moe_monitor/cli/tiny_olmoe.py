"""A tiny OLMoE with random weights and routers that are visibly skewed, for the demo. Written without torch.

The byte-level vocabulary falls into three kinds (letters, digits, the rest). Every token's embedding carries its
kind's direction and one shared direction; the routers read both. The shared one makes some experts hot for all text,
the kinds make prose, numbers and code light up different experts, as real models do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HIDDEN = 128
INTERMEDIATE = 16
LAYERS = 4
EXPERTS = 64
TOP_K = 8
HEADS = 4
CONTEXT = 512
END = "<|endoftext|>"

#: Standard deviation over experts of the logits that the successive layers' routers draw from the shared direction
#: and from a kind's, and that a token's own noise gives.
_SHARED = (0.25, 0.4, 0.55, 0.7)
_BY_KIND = (0.3, 0.45, 0.6, 0.8)
_NOISE = 0.8

#: Lengths of the parts of an embedding: along the shared direction, along the kind's, and the token's own.
_PARTS = (6.0, 8.0, HIDDEN**0.5)


def make(directory: Path, seed: int = 0) -> None:
    """Write config, tokenizer and weights (about 6 MB). Needs the tokenizers and safetensors that vLLM brings."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    kinds = _tokenizer(directory)
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "torch_dtype": "float32",
        "vocab_size": len(kinds),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": False,
        "max_position_embeddings": CONTEXT,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "pad_token_id": len(kinds) - 1,
        "eos_token_id": len(kinds) - 1,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    save_file(_weights(kinds, np.random.default_rng(seed)), directory / "model.safetensors", {"format": "pt"})


def _tokenizer(directory: Path) -> NDArray[np.int64]:
    """One token a byte, and the end of text. Returns each token's kind: 0 letters and spaces, 1 digits, 2 the rest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "model_max_length": CONTEXT}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    space = "Ġ"  # how byte-level vocabularies write a space
    kinds = [1 if s.isascii() and s.isdigit() else 0 if (s.isascii() and s.isalpha()) or s == space else 2
             for s in vocabulary]  # fmt: skip
    return np.array(kinds)


def _weights(kinds: NDArray[np.int64], rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    def normal(*shape: int, scale: float) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    # Orthonormal directions: the first is shared by all tokens, the others are the three kinds'.
    directions = np.linalg.qr(rng.standard_normal((HIDDEN, 4)))[0].T
    embedding = normal(len(kinds), HIDDEN, scale=1.0) + (_PARTS[0] * directions[0] + _PARTS[1] * directions[1 + kinds])
    # The head prefers tokens of the kind that it reads, so that a continuation stays in its prompt's kind.
    head = normal(len(kinds), HIDDEN, scale=0.12) + 0.9 * directions[1 + kinds]
    weights: dict[str, NDArray[Any]] = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.ones(HIDDEN),
        "lm_head.weight": head,
    }
    # Under RMS norm a token has length sqrt(HIDDEN): what a router sees of each part.
    seen = [HIDDEN**0.5 * part / sum(p * p for p in _PARTS) ** 0.5 for part in _PARTS]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            weights[f"{at}{norm}.weight"] = np.ones(HIDDEN)
        for name in "qkvo":
            weights[f"{at}self_attn.{name}_proj.weight"] = normal(HIDDEN, HIDDEN, scale=0.3 / HIDDEN**0.5)
        taste = rng.standard_normal((EXPERTS, 4)) * np.array(
            [_SHARED[layer] / seen[0]] + [_BY_KIND[layer] / seen[1]] * 3
        )
        own = normal(EXPERTS, HIDDEN, scale=_NOISE / seen[2])
        gate = own - own @ directions.T @ directions + taste @ directions
        weights[f"{at}mlp.gate.weight"] = gate
        for expert in range(EXPERTS):
            inside = f"{at}mlp.experts.{expert}."
            weights[f"{inside}gate_proj.weight"] = normal(INTERMEDIATE, HIDDEN, scale=0.1)
            weights[f"{inside}up_proj.weight"] = normal(INTERMEDIATE, HIDDEN, scale=0.1)
            weights[f"{inside}down_proj.weight"] = normal(HIDDEN, INTERMEDIATE, scale=0.1)
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in weights.items()}
