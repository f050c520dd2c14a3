"""What vLLM's MoE layers say of themselves: which there are, their sizes, and which experts lie on this rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


class NothingToMonitor(Exception):
    """The model, or this rank of it, has no routing to count; the message says why. No error."""


@dataclass(frozen=True)
class RouterFacts:
    """What the MoE layers of a model have in common; sizes of the whole layer, not of this rank's shard."""

    experts: int
    top_k: int
    scoring: str
    hidden_size: int
    intermediate_size: int
    matrices: int


def moe_layers(model: torch.nn.Module) -> list[tuple[int, Any]]:
    """(layer index, MoE runner) of all MoE layers on this rank, in model order."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.models.utils import extract_layer_index

    return [(extract_layer_index(m.layer_name), m) for m in model.modules() if isinstance(m, MoERunner)]


def parents_of(model: torch.nn.Module, layers: list[tuple[int, Any]]) -> list[Any]:
    """For each MoE runner the model's module that holds it, and its gate where that lies outside of it."""
    owner = {id(child): parent for parent in model.modules() for child in parent.children()}

    def block(module: Any) -> Any:
        parent = owner[id(module)]
        return block(parent) if getattr(parent, "base_layer", None) is module else parent  # LoRA's lies between

    return [block(runner) for _, runner in layers]


def facts_of(runner: Any) -> RouterFacts:
    """Facts of one MoE layer. Raises NothingToMonitor where its router cannot be observed."""
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    name = runner.layer_name
    if runner.is_monolithic:
        method = type(runner.routed_experts.quant_method).__name__
        raise NothingToMonitor(f"layer {name} routes inside a monolithic kernel ({method}), which hides the choice")
    if not isinstance(runner.router, BaseRouter):
        raise NothingToMonitor(f"layer {name} has a router of an unknown kind ({type(runner.router).__name__})")
    config = runner.moe_config
    if int(getattr(config, "pcp_size", 1)) > 1:
        raise NothingToMonitor(f"layer {name} routes other ranks' tokens, too: prefill context parallelism")
    return RouterFacts(
        experts=int(config.num_logical_experts),
        top_k=int(runner.router.top_k),
        scoring="sigmoid" if getattr(runner.router, "scoring_func", "softmax") == "sigmoid" else "softmax",
        hidden_size=int(config.hidden_dim_unpadded or config.hidden_dim),
        intermediate_size=int(config.intermediate_size),
        matrices=3 if config.activation.is_gated else 2,
    )


def placement_of(runner: Any) -> dict[str, Any] | None:
    """Which logical experts vLLM placed on this expert-parallel rank; None without expert parallelism.

    Replicas of the expert-parallel load balancer move while serving and are not described.
    """
    config = runner.moe_config
    expert_map = runner.expert_map
    if not config.moe_parallel_config.use_ep or expert_map is None or runner.eplb_state is not None:
        return None
    local = (expert_map[: config.num_logical_experts] >= 0).nonzero().flatten().tolist()
    return {"rank": int(config.ep_rank), "size": int(config.ep_size), "experts": local}
