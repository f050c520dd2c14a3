"""Tiny random models of every family that the transformers monitor is tested on, for transformers 4.57 and 5.x."""

from __future__ import annotations

import torch
import transformers
from packaging.version import Version

V5 = Version(transformers.__version__) >= Version("5.0")
VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

#: name -> (class prefix, settings, experts, top-k, MoE layers, scoring)
FAMILIES = {
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}, 8, 3, (0, 1), "softmax"),
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
        4,
        2,
        (0, 1),
        "softmax",
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            # as wide as there are experts: the shared expert's matrices must not be taken for the router's
            "shared_expert_intermediate_size": 8,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
        },
        8,
        2,
        (0, 1),
        "softmax",
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "head_dim": 8,
            "mlp_only_layers": [0],
        },
        8,
        2,
        (1,),
        "softmax",
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "num_key_value_heads": 4,
            **MLA,
        },
        8,
        2,
        (1,),
        "softmax",
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "num_key_value_heads": 4,
            **MLA,
        },
        8,
        2,
        (1,),
        "sigmoid",
    ),
    "gpt_oss": (
        "GptOss",
        {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
        8,
        2,
        (0, 1),
        "softmax",
    ),
    "granitemoe": (
        "GraniteMoe",
        {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2},
        8,
        2,
        (0, 1),
        "softmax",
    ),
    "phimoe": (
        "Phimoe",
        {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2},
        4,
        2,
        (0, 1),
        "softmax",
    ),
}


def make(family: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A tiny random model in eval mode; its weights spread far enough that experts differ in load."""
    prefix, settings, *_ = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **settings, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    return model.eval()


def batch(rows: int = 2, length: int = 7, seed: int = 1) -> torch.Tensor:
    """Token ids [rows, length] without padding or special ids."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), each row with more padding on the left than the one before."""
    ids = batch(rows, length)
    mask = torch.ones_like(ids)
    for i in range(rows):
        mask[i, : 2 * i] = 0
    return ids * mask, mask
