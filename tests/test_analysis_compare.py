"""The verdict: right about real differences, and wrong no more often than it says about noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_analysis_metrics import make_record, published

from moe_monitor.analysis import Record, compare, compare_choices, compare_counts
from moe_monitor.analysis.compare import ALIKE, DIFFERENT, UNKNOWN, js_bits, js_floor_bits


def draw(generator: np.random.Generator, weights: np.ndarray, tokens: int, k: int) -> np.ndarray:
    """Top-k of perturbed log weights (Gumbel): k distinct experts a token, [tokens, experts] of 0 and 1."""
    scores = np.log(weights) + generator.gumbel(size=(tokens, len(weights)))
    chosen = np.argsort(-scores, axis=1)[:, :k]
    result = np.zeros(scores.shape, dtype=np.int64)
    np.put_along_axis(result, chosen, 1, axis=1)
    return result


def texts(generator, weights: np.ndarray, number: int, k: int, wobble: float) -> np.ndarray:
    """Blocks [number, 1, experts]: each text prefers experts of its own, so that its tokens depend on each other."""
    return np.stack(
        [
            draw(generator, weights * np.exp(wobble * generator.normal(size=len(weights))), 40, k).sum(axis=0)
            for _ in range(number)
        ]
    )[:, None]


def test_divergence_of_known_loads() -> None:
    assert js_bits([1, 1], [5, 5]) == 0
    assert js_bits([7, 0], [0, 3]) == 1
    # by hand: a=(1/2,1/2), b=(1,0), m=(3/4,1/4)
    expected = 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25)) + 0.5 * math.log2(1 / 0.75)
    assert js_bits([4, 4], [3, 0]) == pytest.approx(expected)
    assert np.isnan(js_bits([0, 0], [1, 1]))


def test_noise_floor_is_what_simulation_shows() -> None:
    generator = np.random.default_rng(0)
    weights = generator.dirichlet(np.full(32, 4.0))
    seen = [
        js_bits(draw(generator, weights, 500, 4).sum(axis=0), draw(generator, weights, 300, 4).sum(axis=0))
        for _ in range(300)
    ]
    assert js_floor_bits(500, 300, 32, 4) == pytest.approx(np.mean(seen), rel=0.06)


def test_published_texts_route_differently_and_halves_of_one_do_not() -> None:
    c4, tokens = published("c4")
    for other in ("github", "wikipedia", "tulu"):
        counts, n = published(other)
        found = compare_counts(c4, counts, tokens, n, layers=(0, 7, 15))
        assert found.verdict == DIFFERENT
        assert all(layer.js_bits > 50 * layer.floor_bits for layer in found.layers)
    # Halving c4 at random, token by token, must look like noise: binomial halves have the same expectation.
    generator = np.random.default_rng(1)
    half = generator.binomial(c4, 0.5)
    found = compare_counts(half, c4 - half, tokens // 2, tokens // 2)
    assert found.verdict == ALIKE
    assert all(layer.js_bits < 3 * layer.floor_bits for layer in found.layers)


def test_counts_verdict_is_wrong_no_more_often_than_alpha() -> None:
    generator = np.random.default_rng(2)
    weights = generator.dirichlet(np.full(16, 3.0))
    wrong = 0
    for _ in range(200):
        a, b = (np.stack([draw(generator, weights, 400, 2).sum(axis=0)] * 1) for _ in range(2))
        wrong += compare_counts(a, b, 400, 400, alpha=0.05).verdict == DIFFERENT
    assert wrong <= 19  # Binomial(200, 0.05) exceeds 19 with probability 0.2 %


def test_block_verdict_holds_for_dependent_tokens_where_independence_would_cry_wolf() -> None:
    generator = np.random.default_rng(3)
    weights = generator.dirichlet(np.full(16, 3.0))
    wrong = flattered = 0
    rounds = 60
    for _ in range(rounds):
        a, b = (texts(generator, weights, 20, 2, wobble=0.8) for _ in range(2))
        wrong += compare(a, b, alpha=0.05, permutations=199).verdict == DIFFERENT
        flattered += compare_counts(a.sum(axis=0), b.sum(axis=0), 800, 800, alpha=0.05).verdict == DIFFERENT
    assert wrong <= 9  # Binomial(60, 0.05) exceeds 9 with probability 0.1 %
    assert flattered > rounds // 2


def test_block_verdict_sees_a_real_change_and_names_the_experts() -> None:
    generator = np.random.default_rng(4)
    weights = np.full(16, 1 / 16)
    other = weights.copy()
    other[5] *= 3
    a, b = texts(generator, weights, 30, 2, 0.3), texts(generator, other, 30, 2, 0.3)
    # a second layer that does not change
    a, b = (np.concatenate([x, texts(generator, weights, 30, 2, 0.3)], axis=1) for x in (a, b))
    found = compare(a, b, layers=(3, 9))
    assert found.verdict == DIFFERENT
    assert [layer.verdict for layer in found.layers] == [DIFFERENT, ALIKE]
    assert found.layers[0].changed[0][0] == 5
    assert found.layers[0].layer == 3
    assert "1 of 2 layers differ" in str(found)


def test_too_little_data_is_said_to_be_too_little() -> None:
    generator = np.random.default_rng(5)
    a, b = texts(generator, np.full(16, 1 / 16), 2, 2, 0.3), texts(generator, np.full(16, 1 / 16), 2, 2, 0.3)
    assert compare(a, b).verdict == UNKNOWN
    few = np.array([[2, 1, 1, 0]])
    assert compare_counts(few, few, 2, 2).verdict == UNKNOWN
    with pytest.raises(ValueError, match="more tokens than there are"):
        compare_counts(few, few, 1, 1)


def test_records_compare_by_their_sequences() -> None:
    a, b = make_record(tokens=2000, seed=1), make_record(tokens=2000, seed=2)
    assert compare(a, b).verdict == ALIKE
    moved = Record(
        b.layers, b.probabilities, (b.ids + (b.ids == 0)).astype(np.int32), b.token_ids, b.sequence, b.passes
    )
    found = compare(a, moved)
    assert found.verdict == DIFFERENT
    assert 0 in [expert for expert, _, _ in found.layers[0].changed[:2]]


def test_choices_of_the_same_tokens() -> None:
    a = make_record()
    same = compare_choices(a, a)
    assert same.overlap.tolist() == [1, 1]
    assert str(same) == "the same experts for every token in every layer"
    ids = a.ids.copy()
    ids[1, ::2] = (ids[1, ::2] + 1) % 8
    b = Record(a.layers, a.probabilities, ids, a.token_ids, a.sequence, a.passes)
    found = compare_choices(a, b)
    expected = [
        np.mean([len(set(x) & set(y)) / 3 for x, y in zip(p.tolist(), q.tolist(), strict=True)])
        for p, q in zip(a.ids, b.ids, strict=True)
    ]
    assert found.overlap.tolist() == pytest.approx(expected)
    assert found.low[1] < found.overlap[1] < found.high[1]
    assert found.identical[0] == 1
    assert found.identical[1] == pytest.approx(
        np.mean([set(x) == set(y) for x, y in zip(a.ids[1].tolist(), ids[1].tolist(), strict=True)])
    )
    assert found.first.tolist() == [1, 1]
    with pytest.raises(ValueError, match="same tokens"):
        compare_choices(a, make_record(seed=9))


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(80):
        generator = np.random.default_rng(100 + seed)
        a = make_record(tokens=400, layers=1, seed=seed)
        # each sequence has its own rate of change, half on average: expected overlap is (1 + 2/3) / 2
        rate = np.repeat(generator.uniform(0, 1, 40), 10)
        ids = a.ids.copy()
        hit = generator.random(400) < rate
        ids[0, hit, 0] = 99  # no expert: one of three is gone
        b = Record(a.layers, a.probabilities, ids, a.token_ids, a.sequence, a.passes)
        found = compare_choices(a, b, resamples=400)
        hits += bool(found.low[0] <= (1 + 2 / 3) / 2 <= found.high[0])
    assert hits >= 66  # Binomial(80, 0.93), a little below 0.95 with 40 sequences
