"""Summary figures, dynamic k, and the OLMoE paper's metrics, against definitions spelt out in plain Python."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_monitor.analysis import (
    Record,
    co_activation,
    co_activation_bounds,
    domain_specialisation,
    dynamic_k,
    router_saturation,
    saturation_at_most,
    vocabulary_specialisation,
)
from moe_monitor.analysis.summary import describe, histogram_quantile

PUBLISHED = Path(__file__).parent / "data" / "olmoe_expert_counts"


def published(name: str) -> tuple[np.ndarray, int]:
    """Counts [3 layers, 64 experts] and tokens of one text."""
    data = json.loads((PUBLISHED / f"{name}.json").read_text())
    return np.array([data["counts_by_layer"][key] for key in ("0", "7", "15")]), data["tokens"]


def make_record(tokens: int = 200, experts: int = 8, k: int = 3, layers: int = 2, seed: int = 0) -> Record:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(layers, tokens, experts)) * 2
    p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    return Record(
        layers=tuple(range(layers)),
        probabilities=p.astype(np.float32),
        ids=np.argsort(-p, axis=2)[..., :k].astype(np.int32),
        token_ids=generator.integers(0, 12, tokens),
        sequence=np.arange(tokens) // 10,
        passes=np.full(tokens // 10, 10),
    )


def test_co_activation_is_the_papers_fraction() -> None:
    record = make_record()
    found = co_activation(record)
    for layer in range(2):
        sets = [set(row) for row in record.ids[layer].tolist()]
        for i, j in itertools.product(range(8), repeat=2):
            single = sum(i in s for s in sets)
            both = sum(i in s and j in s for s in sets)
            assert found[layer, i, j] == pytest.approx(both / single)
    # with k experts a token, those beside expert i add up to k-1
    np.testing.assert_allclose(found.sum(axis=2) - 1, 2)


def test_an_expert_that_nobody_chose_has_no_company() -> None:
    record = make_record()
    ids = np.where(record.ids == 5, 4, record.ids)
    found = co_activation(Record(record.layers, record.probabilities, ids, *_rest(record)))
    assert np.isnan(found[:, 5]).all()
    assert (found[:, [0, 1, 2, 3, 4, 6, 7]][:, :, 5] == 0).all()


def _rest(record: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return record.token_ids, record.sequence, record.passes


def test_saturation_is_one_against_itself_and_k_over_experts_by_chance() -> None:
    generator = np.random.default_rng(1)
    a, b = (np.argsort(generator.random((1, 20_000, 64)), axis=2)[..., :8] for _ in range(2))
    assert router_saturation(a, a[..., ::-1], 64).tolist() == [1.0]
    # overlap of two random 8-sets of 64 is hypergeometric: mean 1, variance 8 * 1/8 * 7/8 * 56/63
    assert router_saturation(a, b, 64)[0] == pytest.approx(8 / 64, abs=5 * math.sqrt(0.7778 / 64 / 20_000))
    half = np.concatenate([a[..., :4], 63 - a[..., 4:] * 0 - np.arange(4)], axis=2)
    expected = np.mean([len(set(x) & set(y)) / 8 for x, y in zip(a[0].tolist(), half[0].tolist(), strict=True)])
    assert router_saturation(a, half, 64)[0] == pytest.approx(expected)
    with pytest.raises(ValueError, match="one shape"):
        router_saturation(a, b[:, :5], 64)


def test_published_counts_have_the_papers_domain_specialisation() -> None:
    names = ("c4", "github", "wikipedia")
    counts = np.stack([published(name)[0] for name in names])
    tokens = np.array([published(name)[1] for name in names])
    found = domain_specialisation(counts, tokens)
    assert found.shape == (3, 3, 64)
    np.testing.assert_allclose(found.sum(axis=2), 8)  # top-8: over experts the shares sum to k
    assert found.mean() == pytest.approx(8 / 64)  # the paper's "12.5 %" line of uniform routing
    assert found.max() <= 1
    # The paper: specialised texts such as code stand out, general ones such as C4 stay nearer to uniform.
    spread = found.std(axis=2).mean(axis=1)
    assert spread[names.index("github")] > 1.5 * spread[names.index("c4")]
    assert found[names.index("github")].max() > 0.5
    with pytest.raises(ValueError, match="without tokens"):
        domain_specialisation(counts, np.array([1, 0, 1]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3, 7]))
def test_totals_bound_what_only_records_can_tell(seed: int, k: int) -> None:
    record, later = make_record(60, k=k, seed=seed), make_record(60, k=k, seed=seed + 1)
    low, high = co_activation_bounds(record.counts(), record.tokens)
    truth = co_activation(record)
    known = ~np.isnan(truth)
    assert (np.isnan(truth) == np.isnan(low)).all()
    assert (low[known] <= truth[known] + 1e-12).all() and (truth[known] <= high[known] + 1e-12).all()
    saturation = router_saturation(record.ids, later.ids, record.experts)
    assert (saturation <= saturation_at_most(record.counts(), later.counts()) + 1e-12).all()


def test_totals_tell_all_where_there_is_no_choice() -> None:
    ids = np.tile(np.arange(3, dtype=np.int32), (1, 10, 1))  # every token to experts 0, 1 and 2
    record = make_record(10, layers=1)
    record = Record(record.layers, record.probabilities, ids, *_rest(record))
    low, high = co_activation_bounds(record.counts(), 10)
    np.testing.assert_array_equal(low[0, :3, :3], 1)
    np.testing.assert_array_equal(high[0, :3, :3], 1)
    assert saturation_at_most(record.counts(), record.counts()).tolist() == [1.0]
    assert saturation_at_most(record.counts(), np.roll(record.counts(), 3, axis=1)).tolist() == [0.0]
    with pytest.raises(ValueError, match="the same tokens"):
        saturation_at_most(record.counts(), record.counts() * 2)


def test_published_counts_force_two_of_githubs_experts_together() -> None:
    counts, tokens = published("github")
    low, high = co_activation_bounds(counts, tokens)
    # layer 7: 160,773 and 157,847 of 208,896 tokens chose experts 17 and 2
    first, second = sorted(counts[1])[-1:-3:-1]
    assert (counts[1].tolist().index(first), counts[1].tolist().index(second)) == (17, 2)
    assert low[1, 17, 2] == pytest.approx((first + second - tokens) / first)
    assert low[1, 17, 2] > 0.68
    assert high[1, 2, 17] == 1


def test_vocabulary_specialisation_by_hand() -> None:
    record = make_record(layers=3)
    found = vocabulary_specialisation(record, layer=1)
    for at, name in enumerate(found.token_ids.tolist()):
        mine = [record.ids[1, t, 0] for t in np.flatnonzero(record.token_ids == name)]
        assert found.seen[at] == len(mine)
        for expert in range(8):
            assert found.share[at, expert] == pytest.approx(mine.count(expert) / len(mine))
    assert found.mean() == pytest.approx(np.mean([row.max() for row in found.share]))
    whole = vocabulary_specialisation(record, layer=1, top=3)
    np.testing.assert_allclose(whole.share.sum(axis=1), 1)  # N_x counts routings, not tokens
    best = found.of_expert(int(found.share[0].argmax()), least=1)
    assert best[0][1] == max(share for _, share in best)


def test_vocabulary_specialisation_is_one_when_an_expert_belongs_to_a_token() -> None:
    record = make_record(experts=12, k=1)
    p = np.zeros_like(record.probabilities)
    p[:, np.arange(200), record.token_ids] = 1
    ids = np.broadcast_to(record.token_ids[None, :, None], (2, 200, 1)).astype(np.int32)
    found = vocabulary_specialisation(Record((0, 1), p, ids, *_rest(record)), layer=0)
    assert found.mean() == 1
    assert found.of_expert(3) == [(3, 1.0)]


# dynamic k


def naive(p: list[float], rule: str, value: float, least: int, most: int) -> int:
    order = sorted(p, reverse=True)
    if rule == "threshold":
        k = sum(x >= value for x in order)
    elif rule == "mass":
        k, total = 0, 0.0
        while k < len(order) and total < value - 1e-6:
            total += order[k]
            k += 1
    else:
        drops = {k: order[k - 1] - order[k] for k in range(least, min(most, len(order) - 1) + 1)}
        k = max(drops, key=lambda x: (drops[x], -x)) if drops else least
    return min(max(k, least), most)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(1, 1000), min_size=3, max_size=9),
    value=st.floats(0.01, 0.99),
    least=st.integers(1, 2),
)
def test_rules_match_a_plain_reading(weights: list[int], value: float, least: int) -> None:
    p = (np.array(weights) / sum(weights))[None, None, :]
    most = len(weights) - 1
    # 1e-6 is forgiven at the mass, so a value that lies on the edge may go either way
    cumulative = np.cumsum(-np.sort(-p[0, 0]))
    if np.abs(cumulative - value).min() > 1e-5:
        assert dynamic_k.by_mass(p, value, least=least, most=most).item() == naive(
            p[0, 0].tolist(), "mass", value, least, most
        )
    assert dynamic_k.by_threshold(p, value, least=least, most=most).item() == naive(
        p[0, 0].tolist(), "threshold", value, least, most
    )
    assert dynamic_k.by_gap(p, least=least, most=most).item() == naive(p[0, 0].tolist(), "gap", 0, least, most)


def test_effect_of_a_rule() -> None:
    p = np.array([[[0.5, 0.3, 0.2, 0.0], [0.9, 0.05, 0.03, 0.02]]])
    k = dynamic_k.by_mass(p, 0.75)
    assert k.tolist() == [[2, 1]]
    (row,) = dynamic_k.effect(p, k, top_k=2)
    assert row["k_mean"] == 1.5
    assert row["k_counts"] == [0, 1, 1, 0, 0]
    assert row["mass_ratio_mean"] == pytest.approx((0.8 + 0.9) / 2)
    assert row["expert_flops_ratio"] == 0.75
    with pytest.raises(ValueError, match="least"):
        dynamic_k.by_mass(p, 0.5, least=3, most=2)


# summaries


def test_describe_and_quantiles() -> None:
    sample = np.random.default_rng(2).gamma(2, 1, 1001)
    found = describe(sample)
    ordered = sorted(sample.tolist())
    assert found["p50"] == ordered[500]
    assert found["p95"] == ordered[950]
    assert found["p99"] == ordered[990]
    assert found["std"] == pytest.approx(math.sqrt(sum((x - found["mean"]) ** 2 for x in ordered) / 1001))
    assert all(math.isnan(v) for v in describe([]).values())


def test_histogram_quantiles_lie_within_a_bucket_of_the_truth() -> None:
    bounds = (0.1, 0.2, 0.4, 0.8, 1.0)
    sample = np.random.default_rng(3).beta(2, 3, 5000)
    counts = np.histogram(sample, [0, *bounds, np.inf])[0]
    for q in (0.01, 0.5, 0.95, 0.99):
        truth = np.quantile(sample, q)
        low, high = max(b for b in (0.0, *bounds) if b <= truth), min(b for b in bounds if b >= truth)
        assert low <= histogram_quantile(counts, bounds, q) <= high
    assert math.isnan(histogram_quantile(np.zeros(6, dtype=np.int64), bounds, 0.5))
    assert histogram_quantile(np.array([0, 0, 0, 0, 0, 5]), bounds, 0.5) == 1.0


# records


def test_records_go_to_disk_and_back(tmp_path) -> None:
    record = make_record()
    record.save(tmp_path / "r.npz")
    again = Record.load(tmp_path / "r.npz")
    assert again.layers == record.layers
    assert all(
        np.array_equal(getattr(again, k), getattr(record, k))
        for k in ("probabilities", "ids", "token_ids", "sequence", "passes")
    )


def test_records_refuse_arrays_that_do_not_fit() -> None:
    record = make_record()
    with pytest.raises(ValueError, match="do not fit"):
        Record(record.layers, record.probabilities, record.ids[:, :5], *_rest(record))


def test_blocks_keep_sequences_whole_and_lose_nothing() -> None:
    record = make_record(tokens=230)
    blocks = record.blocks(least=32)
    assert blocks.sum(axis=0).tolist() == record.counts().tolist()
    sizes = blocks[:, 0].sum(axis=1) / 3
    assert (sizes >= 32).all()
    assert (sizes % 10 == 0).all()  # sequences of 10 tokens
