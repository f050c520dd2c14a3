"""Finds the routers of a transformers model, by what they are and what they return, not by their names alone.

transformers 5.x routers return (logits, weights, ids); GraniteMoe returns (ids, weights, logits); up to 4.57 a gate is
often an ``nn.Linear`` that returns logits only, DeepSeek returns (ids, weights) and gpt-oss (scores, ids). Which form
a router has is found by running it once on a few random hidden states and comparing what comes out with
``hidden @ weight.T``. The global random state is not touched.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROBE_TOKENS = 4


class UnsupportedModelError(ValueError):
    """The model's routing cannot be monitored; the message says why in one sentence."""


@dataclass(frozen=True)
class Form:
    """Where a router's output holds its logits and its chosen ids; None: not there, they are recomputed.

    ``bare``: the output is the logits tensor itself. ``dtype``: in which the model computes logits it does not return.
    """

    logits: int | None
    ids: int | None
    bare: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Seam:
    """One MoE layer: its modules and facts. ``experts`` is None where the block calls each expert by itself.

    ``hidden`` and ``inner`` are the expert's input and intermediate sizes, ``matrices`` its number of
    hidden-by-inner matrices (SwiGLU: 3), so that one routed token costs 2*matrices*hidden*inner FLOPs.
    """

    layer: int
    name: str
    router: nn.Module
    block: nn.Module
    experts: nn.Module | None
    num_experts: int
    top_k: int
    scoring: str
    form: Form
    hidden: int
    inner: int
    matrices: int
    device: torch.device
    #: The block samples the experts itself in training, so that they cannot be known from the logits.
    samples_in_training: bool = False
    #: In evaluation every expert computes every token, and the weights of those not chosen are 0.
    dense: bool = False

    @property
    def dense_now(self) -> bool:
        return self.dense and not self.block.training


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, also where it is one part of a multimodal one."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def read(seam: Seam, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[Tensor, Tensor]:
    """(logits [tokens, experts], ids [tokens, k]) of one router call, detached. Traceable by torch.compile."""
    form = seam.form
    if form.bare:
        logits = out
    elif form.logits is not None:
        logits = out[form.logits]
    else:
        hidden = args[0] if args else next(iter(kwargs.values()))
        with torch.no_grad():
            logits = _linear(seam.router, hidden.detach(), form.dtype)
    logits = _flat(logits, seam.num_experts)
    if form.ids is not None:
        return logits, _flat(out[form.ids], seam.top_k)
    with torch.no_grad():
        # The operations of the blocks of these versions, so that ties fall the same way: a bare gate's block chooses
        # by probability, a router that returns logits and no ids (GraniteMoe up to 4.57) by logit.
        score = torch.softmax(logits, dim=-1, dtype=torch.float) if form.bare else logits.float()
        return logits, torch.topk(score, seam.top_k, dim=-1).indices


def _flat(x: Tensor, width: int) -> Tensor:
    """Detached, as [tokens, width]; most are so already, and every operation is felt where the host is what waits."""
    if x.requires_grad:
        x = x.detach()
    return x if x.ndim == 2 and x.shape[1] == width else x.reshape(-1, width)


def _matrices(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in module.named_parameters() if p.ndim == 2]


def _linear(router: nn.Module, hidden: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The router's logits from its input and its own single matrix."""
    name, weight = _matrices(router)[0]
    bias = dict(router.named_parameters()).get(name.removesuffix("weight") + "bias")
    hidden = hidden.reshape(-1, weight.shape[1])
    dtype = hidden.dtype if dtype is None else dtype
    return nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _expert_groups(block: nn.Module) -> tuple[list[nn.Module], int] | None:
    """The children of a block that hold experts, and how many experts; None if it holds none."""
    groups: list[nn.Module] = []
    sizes = set()
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList):
            if "expert" in name and "shared" not in name and len(child) > 1:
                groups.append(child)
                sizes.add(len(child))
            continue
        stacked = {p.shape[0] for p in child.parameters(recurse=False) if p.ndim >= 3}
        if len(stacked) == 1 and not isinstance(child, nn.modules.conv._ConvNd):
            groups.append(child)
            sizes |= stacked
    if not groups or len(sizes) != 1 or (number := sizes.pop()) < 2:
        return None
    return groups, number


def _declared(model: nn.Module) -> tuple[type, ...]:
    """Classes that the model itself names as the source of ``output_router_logits``."""
    found = []
    for module in model.modules():
        recorders = (getattr(type(module), "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, list | tuple) else (recorders,):
            target = getattr(recorder, "target_class", recorder)
            if isinstance(target, type):
                found.append(target)
    return tuple(dict.fromkeys(found))


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module, list[nn.Module], int]]:
    declared = _declared(model)
    for name, block in model.named_modules():
        found = _expert_groups(block)
        if found is None:
            continue
        groups, number = found
        routers = []
        for key, child in block.named_children():
            if child in groups or isinstance(child, nn.ModuleList):
                continue
            matrices = _matrices(child)
            width = getattr(child, "out_features", matrices[0][1].shape[0] if matrices else 0)
            if len(matrices) == 1 and width == number:
                routers.append((key, child))
        if len(routers) > 1:
            named = [r for r in routers if isinstance(r[1], declared)]
            routers = named or [r for r in routers if re.search("rout|gate|gating", r[0] + type(r[1]).__name__.lower())]
        if len(routers) == 1:
            key, router = routers[0]
            yield f"{name}.{key}" if name else key, router, block, groups, number


def _probe(router: nn.Module, hidden: int) -> tuple[Tensor, Tensor, Any]:
    """(input, logits, output) of the router on random hidden states whose logits spread by about 2."""
    weight = _matrices(router)[0][1]
    hook = getattr(router, "_hf_hook", None)  # accelerate: weights on disk or another device until the call
    device = getattr(hook, "execution_device", None)
    device = torch.device(device if device is not None else weight.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((PROBE_TOKENS, hidden), generator=generator).to(device)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    was = router.training
    router.training = False  # plain attribute: train() would also change children and call overrides
    try:
        with torch.no_grad():
            if weight.device.type != "meta":
                spread = float(nn.functional.linear(x, weight.float()).std()) if weight.is_floating_point() else 1.0
                x = x * (2 / spread) if spread > 0 and math.isfinite(spread) else x
            x = x.to(dtype)
            try:
                out = router.forward(x)
            except (ValueError, RuntimeError, IndexError):
                out = router.forward(x[None])  # DeepSeek-V2 up to 4.57 wants [batch, sequence, hidden]
            logits = _linear(router, x, torch.float32) if weight.device.type != "meta" else torch.empty(0)
    finally:
        router.training = was
    return x, logits, out


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of bfloat16: relative error of the whole."""
    a, b = a.float(), b.float()
    return a.shape == b.shape and bool((a - b).norm() <= 0.02 * b.norm())


def _form(name: str, out: Any, logits: Tensor, experts: int) -> tuple[Form, int | None, Tensor | None]:
    """(form, top-k, weights of the chosen experts) from a probe's output."""
    if isinstance(out, Tensor):
        if out.shape[-1] != experts:
            raise UnsupportedModelError(f"the router {name} returns a tensor of shape {tuple(out.shape)}, not logits")
        return Form(None, None, bare=True), None, None
    if not isinstance(out, tuple | list):
        raise UnsupportedModelError(f"the router {name} returns {type(out).__name__}, which is not known here")
    tensors = [(i, t) for i, t in enumerate(out) if isinstance(t, Tensor) and t.numel() % PROBE_TOKENS == 0]
    known = logits.numel() > 0
    where = None
    ids_at, top_k, weights = None, None, None
    for i, t in tensors:
        flat = t.reshape(PROBE_TOKENS, -1) if t.numel() else t
        if t.is_floating_point() and flat.shape[-1] == experts and where is None:
            if (known and _close(flat, logits.to(flat.device))) or (not known and len(out) == 3):
                where = i
        elif not t.is_floating_point() and t.ndim >= 2 and t.shape[-1] <= experts and ids_at is None:
            ids_at, top_k = i, int(t.shape[-1])
    rest = [t for i, t in tensors if t.is_floating_point() and i != where]
    if ids_at is not None:
        for t in rest:
            if t.shape[-1] == top_k:
                weights = t.reshape(PROBE_TOKENS, -1)
            elif t.shape[-1] == experts:
                weights = t.reshape(PROBE_TOKENS, -1).gather(-1, out[ids_at].reshape(PROBE_TOKENS, -1))
    if where is None and ids_at is None:
        raise UnsupportedModelError(f"the router {name} returns neither logits nor expert ids in a form known here")
    dtype = None if where is not None else (rest[0].dtype if rest else torch.float32)
    return Form(where, ids_at, dtype=dtype), top_k, weights


def _scoring(router: nn.Module, config: Any, logits: Tensor, ids: Tensor | None, weights: Tensor | None) -> str:
    """softmax or sigmoid: whichever score the returned weights are proportional to, else what the model declares."""
    if ids is not None and weights is not None and logits.numel():
        ids = ids.reshape(PROBE_TOKENS, -1).long()
        spreads = {}
        for name, score in (("softmax", torch.softmax(logits, -1)), ("sigmoid", torch.sigmoid(logits))):
            ratio = weights.float() / score.gather(-1, ids)
            axis = -1 if ratio.shape[-1] > 1 else 0
            spreads[name] = float((ratio.std(axis) / ratio.mean(axis).abs()).max())
        best = min(spreads, key=lambda name: spreads[name])
        if spreads[best] < 0.02 and max(spreads.values()) > 4 * spreads[best]:
            return best
    declared = str(getattr(config, "scoring_func", "")).lower()
    if declared in {"softmax", "sigmoid"}:
        return declared
    return "sigmoid" if hasattr(router, "e_score_correction_bias") else "softmax"


def _top_k(block: nn.Module, config: Any) -> int:
    names = ("num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k")
    # not the configuration's top_k: that is a sampling parameter of generate
    for source, known in ((block, ("top_k", *names)), (config, names)):
        for name in known:
            value = getattr(source, name, None)
            if isinstance(value, int) and value > 0:
                return value
    raise UnsupportedModelError("the model does not say how many experts a token is routed to")


def _expert_shape(groups: list[nn.Module], experts: int, hidden: int, config: Any) -> tuple[int, int]:
    """(intermediate size, number of hidden-by-intermediate matrices) of one expert, from its parameters."""
    sizes = []
    for group in groups:
        if isinstance(group, nn.ModuleList):
            sizes += [p.numel() for p in group[0].parameters() if p.ndim == 2]
        else:
            sizes += [p.numel() // experts for p in group.parameters() if p.ndim == 3]
    if sizes and all(size % hidden == 0 for size in sizes):
        inner = min(sizes) // hidden
        if inner and sum(sizes) % (hidden * inner) == 0 and sum(sizes) // (hidden * inner) <= 4:
            return inner, sum(sizes) // (hidden * inner)
    for name in ("moe_intermediate_size", "intermediate_size"):  # packed (quantised) weights do not show their shape
        if isinstance(value := getattr(config, name, None), int):
            return value, 3
    return 0, 3


def _dense(block: nn.Module, experts: nn.Module | None, device: torch.device, form: Form, scores_all: bool) -> bool:
    """Whether every expert computes every token in evaluation: gpt-oss up to 4.57, on any device but a CPU.

    Such a router gives the experts scores [tokens, experts], 0 where not chosen. A block whose forward was replaced
    by a kernel (not by accelerate's hooks, which run the old one) computes as the kernel likes.
    """
    if experts is None or device.type == "cpu" or not scores_all or form.logits is not None:
        return False
    replaced = "forward" in block.__dict__ and not hasattr(block, "_hf_hook")
    return not replaced and {"router_indices", "routing_weights"} <= set(_parameters(experts))


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)


def _layer_index(name: str, ordinal: int) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else ordinal


def find_seams(model: nn.Module, layers: Sequence[int] | None = None) -> list[Seam]:
    """Every MoE layer of the model in order, or those of ``layers`` (indices in the model).

    Raises UnsupportedModelError: no router found, an encoder-decoder model, a router of unknown form, or layers
    that differ in number of experts, top-k, scoring or sizes (choose alike ones with ``layers``).
    """
    config = text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError("encoder-decoder models are not supported: two token streams meet in one pass")
    seams: list[Seam] = []
    for ordinal, (name, router, block, groups, experts) in enumerate(_candidates(model)):
        layer = _layer_index(name, ordinal)
        if layers is not None and layer not in layers:
            continue
        weight = _matrices(router)[0][1]
        hidden = int(getattr(router, "in_features", weight.shape[-1]))
        x, logits, out = _probe(router, hidden)
        form, top_k, weights = _form(name, out, logits, experts)
        ids = out[form.ids] if form.ids is not None else None
        inner, matrices = _expert_shape(groups, experts, hidden, config)
        whole = len(groups) == 1 and not isinstance(groups[0], nn.ModuleList)
        scores_all = isinstance(out, tuple) and any(t.shape[-1] == experts and t.is_floating_point() for t in out)
        seam = Seam(
            layer=layer,
            name=name,
            router=router,
            block=block,
            experts=groups[0] if whole else None,
            dense=_dense(block, groups[0] if whole else None, x.device, form, scores_all),
            num_experts=experts,
            top_k=_top_k(block, config) if top_k is None else top_k,
            scoring=_scoring(router, config, logits, ids, weights),
            form=form,
            hidden=hidden,
            inner=inner,
            matrices=matrices,
            device=x.device,
            samples_in_training=form.ids is None and hasattr(block, "router_jitter_noise"),
        )
        seams.append(seam)
    if not seams:
        raise UnsupportedModelError(f"no mixture-of-experts router was found in {type(model).__name__}")
    if len({s.layer for s in seams}) != len(seams):
        raise UnsupportedModelError("two routers lie in one layer; monitor the language model alone")
    for fact in ("num_experts", "top_k", "scoring", "hidden", "inner", "matrices"):
        groups_by: dict[Any, list[int]] = {}
        for seam in seams:
            groups_by.setdefault(getattr(seam, fact), []).append(seam.layer)
        if len(groups_by) > 1:
            told = "; ".join(f"{value} in layers {where}" for value, where in groups_by.items())
            raise UnsupportedModelError(f"layers differ in {fact}: {told}. Choose alike ones with layers=[...]")
    return seams
