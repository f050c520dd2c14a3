"""docs/olmoe.md, row by row: computed anew from the installed transformers, and from vLLM's source."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_analysis_metrics import published  # noqa: E402
from transformers_models import V5, batch, make  # noqa: E402

from moe_monitor import statistics  # noqa: E402
from moe_monitor.analysis import domain_specialisation  # noqa: E402

PAGE = (Path(__file__).parent.parent / "docs" / "olmoe.md").read_text()


def table(heading: str, column: int = 1) -> dict[str, str]:
    """First column -> the given column of the first table after a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[column] for row in rows[2:]}


def on_meta(kind: str, **settings: object):
    """A model of full size without memory: shapes only."""
    with torch.device("meta"):
        return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))


@pytest.fixture(scope="module")
def olmoe():
    # What OLMoE-1B-7B-0924's configuration sets otherwise than the class: the intermediate size.
    return on_meta("Olmoe", intermediate_size=1024)


def sizes(model, experts: int, top_k: int) -> tuple[int, int, int]:
    """(parameters, of these in experts, used by one token)."""
    total = sum(p.numel() for p in model.parameters())
    inside = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return total, inside, total - inside + inside * top_k // experts


def facts(model) -> dict[str, object]:
    config = model.config
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    total, inside, used = sizes(model, experts, config.num_experts_per_tok)
    blocks = [layer for layer in model.model.layers if any("experts" in n for n, _ in layer.named_modules())]
    expert = next(p for n, p in model.model.layers[0].named_parameters() if "down_proj" in n or "w2" in n)
    return {
        "hidden size": config.hidden_size,
        "expert intermediate size": expert.shape[-1],
        "layers": len(model.model.layers),
        "experts per layer": experts,
        "experts per token": config.num_experts_per_tok,
        "shared experts": sum("shared" in name for name, _ in model.named_modules()),
        "layers without experts": len(model.model.layers) - len(blocks),
        "attention heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "head size": model.model.layers[0].self_attn.head_dim,
        "vocabulary": model.get_input_embeddings().weight.shape[0],
        "positions": config.max_position_embeddings,
        "activation": config.hidden_act,
        "parameters": total,
        "of these in experts": inside,
        "used by one token": used,
    }


def test_the_model(olmoe) -> None:
    known = facts(olmoe) | {"`norm_topk_prob`": olmoe.config.norm_topk_prob}
    assert table("The model") == {key: str(value) for key, value in known.items()}
    # the name says 1B active and 7B in all; with the class's own default it would be 13B
    assert round(int(known["parameters"]) / 1e9) == 7
    assert transformers.OlmoeConfig().intermediate_size == 2048
    assert sizes(on_meta("Olmoe"), 64, 8)[0] == pytest.approx(13.4e9, rel=0.005)
    assert "12,582,912 FLOPs" in PAGE
    assert 2 * 3 * 2048 * 1024 == 12_582_912
    assert 2 * 2048 * 64 == 262_144


def test_modules(olmoe) -> None:
    said = table("Modules in transformers", 1 if V5 else 2)
    for what in ("block", "router", "experts"):
        path, kind = said[what].split(": ")
        assert type(olmoe.get_submodule(path.strip("`"))).__name__ == kind.strip("`")
    gate = olmoe.model.layers[0].mlp.gate
    assert said["router weight"] == str(tuple(gate.weight.shape))
    assert said["router bias"] == "none"
    assert getattr(gate, "bias", None) is None
    experts = olmoe.model.layers[0].mlp.experts
    for row in ("gate and up weights", "down weights"):
        name, shape = said[row].split(" ", 1)
        assert str(tuple(experts.get_parameter(name.strip("`")).shape)) == shape


def describe(value, tokens: int, names: dict[str, str]) -> str:
    """What a module returned, in the page's words; ``names`` tells tensors apart by type and last size."""
    parts = value if isinstance(value, tuple) else (value,)
    said = []
    for part in parts:
        assert part.shape[0] == tokens or part.ndim == 3
        if part.ndim == 3:
            said.append("hidden states")
        else:
            kind = names["integer" if not part.is_floating_point() else str(part.shape[-1])]
            said.append(f"{kind} (tokens, {part.shape[-1]})")
    return ", ".join(said)


def test_what_router_and_block_return() -> None:
    model = make("olmoe", num_experts=64, num_experts_per_tok=8, norm_topk_prob=False)
    seen = {}
    block = model.model.layers[0].mlp
    block.gate.register_forward_hook(lambda _m, _a, out: seen.update(router=out))
    block.register_forward_hook(lambda _m, _a, out: seen.update(block=out))
    with torch.no_grad():
        out = model(batch(2, 5), output_router_logits=True)
    said = table("Modules in transformers", 1 if V5 else 2)
    names = {"64": "logits", "8": "weights", "integer": "ids"}
    assert describe(seen["router"], 10, names) == said["router returns"]
    assert describe(seen["block"], 10, names) == said["block returns"]
    assert len(out.router_logits) == 2
    assert out.router_logits[0].shape == (10, 64)
    if V5:  # not renormalised: softmax over all 64, the eight largest as they are
        logits, weights, ids = seen["router"]
        p = np.exp(logits.double().numpy())
        p /= p.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(weights, np.take_along_axis(p, ids.numpy(), axis=1), rtol=1e-5)
        assert (weights.sum(dim=1) < 1).all()
        assert np.sort(p, axis=1)[:, -8:].sum(axis=1) == pytest.approx(weights.sum(dim=1).numpy(), rel=1e-5)


@pytest.mark.skipif(not V5, reason="4.57 has no fused experts")
def test_gate_comes_before_up_and_an_expert_is_a_swiglu() -> None:
    experts = make("olmoe").model.layers[0].mlp.experts
    x = torch.randn(1, 32)
    with torch.no_grad():
        out = experts(x, torch.tensor([[3]]), torch.ones(1, 1))
        gate, up = experts.gate_up_proj[3][:24], experts.gate_up_proj[3][24:]
        expected = experts.down_proj[3] @ (torch.nn.functional.silu(gate @ x[0]) * (up @ x[0]))
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)


def vllm_file(path: str) -> ast.Module:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    return ast.parse((Path(spec.origin).parent / path).read_text())


def initialiser(module: ast.Module, name: str) -> dict[str, dict[str, object]]:
    """Attributes that a class's __init__ sets from calls, with the calls' constant arguments."""
    kind = next(n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name)
    init = next(n for n in kind.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    found: dict[str, dict[str, object]] = {}
    for node in ast.walk(init):
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and isinstance(node.targets[0], ast.Attribute)
        ):
            constants = {k.arg: k.value.value for k in node.value.keywords if isinstance(k.value, ast.Constant)}
            found[node.targets[0].attr] = constants
    return found


def test_vllms_modules() -> None:
    said = table("The same modules in vLLM", 2)
    made = initialiser(vllm_file("model_executor/models/olmoe.py"), said["block"].strip("`"))
    assert {"gate", "experts"} <= set(made)
    assert said["top-k weights renormalised"] == f"`renormalize={made['experts']['renormalize']}`"
    mixtral = initialiser(vllm_file("model_executor/models/mixtral.py"), "MixtralMoE")
    assert mixtral["experts"]["renormalize"] is True
    source = ast.dump(vllm_file("model_executor/layers/fused_moe/unquantized_fused_moe_method.py"))
    for row in ("gate and up weights", "down weights"):
        assert f"'{said[row].split('`')[1]}'" in source


def test_next_to_mixtral(olmoe) -> None:
    mixtral = on_meta("Mixtral")
    for column, model, renormalised in ((1, olmoe, "no"), (2, mixtral, "yes")):
        known = facts(model) | {"top-k weights renormalised": renormalised}
        known["auxiliary loss weight in the configuration"] = model.config.router_aux_loss_coef
        for key, value in table("Next to Mixtral-8x7B", column).items():
            assert value == str(known[key]), key
    if V5:
        gate = make("mixtral").model.layers[0].mlp.gate
        with torch.no_grad():
            _, weights, _ = gate(torch.randn(20, 32))
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(20))


def test_real_routing() -> None:
    for text, said in table("What real routing looks like").items():
        counts, tokens = published(text)
        assert said == ", ".join(f"{x:.2f}" for x in counts.max(axis=1) / counts.mean(axis=1))
    assert statistics.imbalance_floor(tokens, 64, 8) == pytest.approx(1.014, abs=0.0005)


def test_domain_specialisation() -> None:
    said = table("Domain specialisation")
    for text, row in said.items():
        counts, tokens = published(text)
        share = 100 * domain_specialisation(counts, tokens)
        assert row == ", ".join(f"{high:.1f} / {low:.1f}" for high, low in zip(share.max(1), share.min(1), strict=True))
    assert set(said) == {"c4", "wikipedia", "github", "tulu"}
