"""Every family: the monitor counts what the experts were really given, and measures the model's own logits."""

from __future__ import annotations

import numpy as np
import pytest
from packaging.version import Version

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers_models import FAMILIES, V5, batch, left_padded, make  # noqa: E402

from moe_monitor.capture.transformers import UnsupportedModelError, monitor  # noqa: E402


class Given:
    """Oracle: tokens that arrive at each expert, seen where the experts are called, not where they are chosen."""

    def __init__(self, model, experts: int) -> None:
        self.counts: dict[int, np.ndarray] = {}
        self.experts = experts
        self.handles = []
        for name, module in model.named_modules():
            parts = name.split(".")
            if parts[-1] == "experts" and isinstance(module, torch.nn.ModuleList):
                for expert, child in enumerate(module):
                    self._hook(child, self._one(int(parts[2]), expert))
            elif parts[-1] == "experts" or (not V5 and parts[-1] == "input_linear"):
                self._hook(module, self._all(int(parts[2])))

    def _hook(self, module, hook) -> None:
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _row(self, layer: int) -> np.ndarray:
        return self.counts.setdefault(layer, np.zeros(self.experts, dtype=np.int64))

    def _one(self, layer: int, expert: int):
        def hook(module, args, kwargs) -> None:
            self._row(layer)[expert] += args[0].shape[0]

        return hook

    def _all(self, layer: int):
        def hook(module, args, kwargs) -> None:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            ids = [t for t in tensors if not t.is_floating_point()]
            if ids:
                self._row(layer)[:] += np.bincount(ids[0].reshape(-1).numpy(), minlength=self.experts)
            else:  # GraniteMoe up to 4.57: inputs sorted by expert, and a list of how many each gets
                self._row(layer)[:] += np.asarray(args[1])

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_what_the_experts_were_given(family: str) -> None:
    _, _, experts, top_k, layers, scoring = FAMILIES[family]
    model = make(family)
    given = Given(model, experts)
    with torch.no_grad(), monitor(model) as m:
        for seed in (1, 2):
            model(batch(2, 11, seed=seed))
    given.remove()
    assert not m.off, m.reason
    assert (m.layers, m.layout.experts, m.identity["top_k"]) == (layers, experts, top_k)
    assert m.identity["scoring"] == scoring
    snapshot = m.snapshot()
    assert snapshot.counts.tolist() == [given.counts[layer].tolist() for layer in layers]
    assert snapshot.counts.sum(axis=1).tolist() == [2 * 22 * top_k] * len(layers)
    assert snapshot.passes == 2
    assert (snapshot.counts.max(axis=1) > snapshot.counts.min(axis=1)).all()  # else equality would say little


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_bit_identical(family: str) -> None:
    model = make(family)
    ids, mask = left_padded()
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        with monitor(model, record=True) as m:
            during = model(ids, attention_mask=mask).logits
        after = model(ids, attention_mask=mask).logits
    assert not m.off, m.reason
    assert torch.equal(before, during)
    assert torch.equal(before, after)


#: Families whose output carries router logits in both supported versions of transformers.
WITH_LOGITS = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "phimoe"]


@pytest.mark.parametrize("family", WITH_LOGITS + (["gpt_oss", "deepseek_v2", "deepseek_v3"] if V5 else []))
def test_router_figures_match_float64_of_the_models_own_logits(family: str) -> None:
    scoring = FAMILIES[family][5]
    model = make(family)
    ids, mask = left_padded()
    with torch.no_grad(), monitor(model, record=True) as m:
        out = model(ids, attention_mask=mask, output_router_logits=True)
    returned = getattr(out, "router_logits", None)
    if returned is None and Version(transformers.__version__) < Version("5.19"):
        pytest.skip("this transformers returns no router logits for this family")
    logits = [x for x in returned if x is not None]
    if not V5 and family == "qwen3_moe":
        logits = logits[-1:]
    real = mask.reshape(-1).bool().numpy()
    record = m.record()
    assert len(logits) == len(m.layers)
    for at, layer in enumerate(logits):
        x = layer.double().numpy().reshape(-1, m.layout.experts)[real]
        score = 1 / (1 + np.exp(-x)) if scoring == "sigmoid" else np.exp(x)
        p = score / score.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(record.probabilities[at], p, rtol=2e-5, atol=1e-7)
        entropy = -(p * np.log(p)).sum(axis=1) / np.log(p.shape[1])
        row = m.summary().rows[at]
        assert row["router_entropy_ratio_mean"] == pytest.approx(entropy.mean(), rel=1e-5)
        assert row["router_entropy_ratio_p95"] == pytest.approx(np.quantile(entropy, 0.95), rel=1e-5)
        assert row["top1_probability_std"] == pytest.approx(p.max(axis=1).std(), rel=1e-4)
        mass = np.take_along_axis(p, record.ids[at].astype(np.int64), axis=1).sum(axis=1)
        assert row["selected_mass_ratio_mean"] == pytest.approx(mass.mean(), rel=1e-5)
        # counters of the same pass, without the record
        engine = m.snapshot()
        counted = engine.column("entropy_sum")[at] / (1 << 20) / real.sum()
        assert counted == pytest.approx(entropy.mean(), rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_counts_once_and_leaves_gradients_alone(family: str) -> None:
    model = make(family)
    if family == "phimoe" and not V5:
        pytest.skip("samples its experts inside the block; see test_transformers_session")
    ids = batch(2, 6)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)  # PhiMoE samples
        model(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    before = gradients()
    with monitor(model) as m:
        during = gradients()
    assert not m.off, m.reason
    assert m.snapshot().counts.sum() == 12 * m.identity["top_k"] * len(m.layers)
    assert len(before) == len(during)
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    assert not any(x.requires_grad for group in m.groups for x in [group.rows])


def test_attaching_draws_no_random_numbers_and_keeps_the_mode() -> None:
    model = make("phimoe").train()
    state = torch.get_rng_state()
    with monitor(model):
        assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())


def test_bfloat16_and_uniform_weights_are_still_read_rightly() -> None:
    for family in ("olmoe", "deepseek_v3", "gpt_oss", "granitemoe"):
        model = make(family).to(torch.bfloat16)
        given = Given(model, FAMILIES[family][2])
        with torch.no_grad(), monitor(model) as m:
            model(batch(2, 12))
        given.remove()
        assert not m.off, m.reason
        assert m.identity["scoring"] == FAMILIES[family][5]
        assert m.snapshot().counts.tolist() == [given.counts[i].tolist() for i in m.layers]
    model = make("olmoe")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)  # all experts equally likely: the probe learns nothing
    with torch.no_grad(), monitor(model) as m:
        model(batch())
    assert m.identity["scoring"] == "softmax"
    assert m.summary().rows[0]["router_entropy_ratio_mean"] == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_monitored_is_refused_with_a_reason() -> None:
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(UnsupportedModelError, match="no mixture-of-experts router was found in LlamaForCausalLM"):
        monitor(dense)
    switch = transformers.SwitchTransformersConfig(
        vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2, num_experts=4
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        monitor(transformers.SwitchTransformersForConditionalGeneration(switch))


def test_layers_that_differ_are_refused_and_can_be_chosen() -> None:
    model = make("olmoe")
    other = make("olmoe", num_experts=4)
    model.model.layers[1].mlp = other.model.layers[1].mlp
    with pytest.raises(UnsupportedModelError, match=r"num_experts: 8 in layers \[0\]; 4 in layers \[1\]"):
        monitor(model)
    with torch.no_grad(), monitor(model, layers=[1]) as m:
        model(batch())
    assert not m.off, m.reason
    assert m.snapshot().counts.shape == (1, 4)
    assert m.snapshot().counts.sum() == 14 * 3


def test_a_router_is_found_by_what_it_is_not_by_its_name() -> None:
    model = make("olmoe")
    for layer in model.model.layers:
        block = layer.mlp
        block.add_module("selector", block.gate)
        del block._modules["gate"]
        block.gate_fn = block.selector

        def forward(hidden, block=block):
            shape = hidden.shape
            hidden = hidden.reshape(-1, shape[-1])
            found = block.selector(hidden)
            if isinstance(found, tuple):
                return block.experts(hidden, found[2], found[1]).reshape(shape)
            return hidden.reshape(shape), found

        block.forward = forward
        block._modules.pop("gate_fn", None)
    with torch.no_grad(), monitor(model) as m:
        model(batch())
    assert not m.off, m.reason
    assert [seam.name for seam in m.seams] == ["model.layers.0.mlp.selector", "model.layers.1.mlp.selector"]
    assert m.snapshot().counts.sum(axis=1).tolist() == [42, 42]


def test_of_two_that_look_like_routers_the_declared_one_is_taken() -> None:
    model = make("olmoe")
    for layer in model.model.layers:
        layer.mlp.add_module("another", torch.nn.Linear(32, 8, bias=False))
    with torch.no_grad(), monitor(model) as m:
        model(batch())
    assert not m.off, m.reason
    assert {seam.name.rsplit(".", 1)[1] for seam in m.seams} == {"gate"}
