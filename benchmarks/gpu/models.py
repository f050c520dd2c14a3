"""Model folders with real shapes for ``--load-format dummy``: a config.json and a byte tokenizer, no weights."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "vocab_size": 50304,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "eos_token_id": 50279,
    "pad_token_id": 1,
}

_SMALL = {"hidden_act": "silu", "dtype": "bfloat16", "max_position_embeddings": 4096, "vocab_size": 4096}
_SMALL |= {"num_hidden_layers": 4, "hidden_size": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "rope_theta": 10000.0}

#: OLMoE-1B-7B, and other families with their shapes reduced.
FAMILIES = {
    "olmoe": OLMOE,
    # small enough for a CPU: to try a script where no GPU is
    "tiny": OLMOE
    | {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # vLLM's CPU attention needs heads of at least 32
        "num_key_value_heads": 2,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "vocab_size": 4096,
        "dtype": "float32",
        "eos_token_id": 0,
    },
    # 16 layers of 128 experts, as deep as OLMoE and twice as wide in experts
    "wide": OLMOE | {"num_experts": 128, "intermediate_size": 512},
    "mixtral": _SMALL
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": 512,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": _SMALL
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    # as many layers and experts as DeepSeek-V3 routes, narrow
    "deep": _SMALL
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 58,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek": _SMALL
    | {
        # grouped sigmoid routing with a correction bias and shared experts, plain attention
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "intermediate_size": 512,
        "moe_intermediate_size": 256,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": False,
        "attention_bias": False,
    },
    "gpt_oss": _SMALL
    | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "intermediate_size": 512,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "attention_bias": True,
        "swiglu_limit": 7.0,
    },
}


def write(folder: Path, family: str = "olmoe") -> Path:
    """A model folder that vLLM can serve with dummy weights; whole whenever it is there, for several may make it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    config, text = folder / "config.json", json.dumps(FAMILIES[family], indent=1)
    if config.exists() and config.read_text() == text:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent))
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(fresh)
    (fresh / "config.json").write_text(text)
    fresh.chmod(0o755)
    with contextlib.suppress(OSError):
        fresh.rename(folder)
        return folder
    if not config.exists() or config.read_text() != text:  # an earlier version's: nobody uses it
        shutil.rmtree(folder)
        fresh.rename(folder)
    else:  # somebody else was first
        shutil.rmtree(fresh)
    return folder
