"""Drift and what sampling explains of it, against definitions in plain float64 and against simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_monitor import statistics


def by_definition(a, b):
    """H(M) - (H(P) + H(Q)) / 2 in bits, expert by expert with Python floats."""
    p, q = ([float(x) / math.fsum(v) for x in v] for v in (a, b))

    def entropy(v):
        return -math.fsum(x * math.log2(x) for x in v if x > 0)

    return entropy([(x + y) / 2 for x, y in zip(p, q, strict=True)]) - (entropy(p) + entropy(q)) / 2


def draw(rng, tokens, weights, top_k, batch=20_000):
    """Counts of ``tokens`` tokens that each take ``top_k`` different experts (Gumbel top-k)."""
    counts = np.zeros(len(weights), dtype=np.int64)
    for start in range(0, tokens, batch):
        n = min(batch, tokens - start)
        keys = np.log(weights) + rng.gumbel(size=(n, len(weights)))
        counts += np.bincount(np.argpartition(-keys, top_k, axis=1)[:, :top_k].ravel(), minlength=len(weights))
    return counts


counts = arrays(np.int64, 16, elements=st.integers(0, 10**9)).filter(lambda a: a.sum() > 0)


@given(counts, counts)
def test_divergence_by_definition(a, b):
    found = float(statistics.js_divergence(a, b))
    assert found == pytest.approx(by_definition(a, b), abs=1e-12)
    assert 0 <= found <= 1 + 1e-12
    assert float(statistics.js_divergence(b, a)) == pytest.approx(found, abs=1e-12)


@given(counts, st.integers(1, 1000))
def test_divergence_of_multiples_is_zero(a, factor):
    assert float(statistics.js_divergence(a, a * factor)) == pytest.approx(0, abs=1e-12)


def test_divergence_of_known_cases():
    assert statistics.js_divergence([1, 0], [0, 5]) == 1
    assert statistics.js_divergence([1, 1, 0, 0], [0, 0, 1, 1]) == 1
    assert np.isnan(statistics.js_divergence([0, 0], [1, 1]))
    assert statistics.js_divergence(np.ones((3, 2, 8)), np.ones(8)).shape == (3, 2)
    with pytest.raises(ValueError, match="negative"):
        statistics.js_divergence([-1, 2], [1, 1])


@pytest.mark.parametrize("tokens", [16, 100, 1000, 10_000])
@pytest.mark.parametrize("skew", [0.0, 1.0, 2.5])
def test_floor_against_simulation(tokens, skew):
    """From where hardly an expert is seen to where all are seen often, from uniform to very skewed."""
    rng = np.random.default_rng(7)
    experts, top_k = 64, 8
    weights = np.arange(1, experts + 1) ** -skew
    truth = draw(rng, 400_000, weights, top_k)
    drifts = [statistics.js_divergence(draw(rng, tokens, weights, top_k), truth) for _ in range(60)]
    floor = float(statistics.js_floor(tokens * top_k, truth, top_k))
    error = np.std(drifts) / math.sqrt(len(drifts))
    # With one expert in nearly every token the Poisson approximation is some per cent off.
    assert floor == pytest.approx(np.mean(drifts), rel=0.06, abs=4 * error)


def test_floor_counts_the_baselines_own_sampling():
    rng = np.random.default_rng(3)
    weights = np.ones(32)
    drifts = [statistics.js_divergence(draw(rng, 2000, weights, 4), draw(rng, 1000, weights, 4)) for _ in range(200)]
    floor = statistics.js_floor(2000 * 4, np.full(32, 1000 * 4 / 32), 4)
    assert float(floor) == pytest.approx(np.mean(drifts), rel=0.05)


def test_floor_for_many_tokens_is_the_chi_square_value():
    found = statistics.js_floor(8e6, np.full(64, 1e12), 8)
    assert float(found) == pytest.approx((64 - 8) / (8 * 8e6 * math.log(2)), rel=1e-6)


def test_floor_shapes_and_empty_windows():
    floor = statistics.js_floor(np.array([100, 0, 1000]), np.ones((3, 16)), np.array([2, 2, 2]))
    assert floor.shape == (3,)
    assert np.isnan(floor[1])
    assert floor[0] > floor[2] > 0


@pytest.mark.parametrize("tokens", [50, 5000])
def test_cv_floor_against_simulation(tokens):
    rng = np.random.default_rng(5)
    squares = [float(statistics.cv(draw(rng, tokens, np.ones(64), 8))) ** 2 for _ in range(100)]
    assert float(statistics.cv_floor(tokens, 64, 8)) == pytest.approx(math.sqrt(np.mean(squares)), rel=0.05)
    assert np.isnan(statistics.cv_floor(0, 64, 8))
