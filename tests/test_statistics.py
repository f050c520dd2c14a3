"""Statistics against closed forms worked out by hand, scipy-free Monte Carlo, and the published routing of OLMoE."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_monitor import statistics


def test_by_hand() -> None:
    counts = [6, 2, 0, 0]  # mean 2
    assert statistics.imbalance(counts) == 3
    assert statistics.cv(counts) == pytest.approx(math.sqrt((16 + 0 + 4 + 4) / 4) / 2)
    # mean absolute difference over all ordered pairs: (4+6+6+4+2+2+6+2+0+6+2+0)/16 = 40/16; over twice the mean
    assert statistics.gini(counts) == pytest.approx(40 / 16 / 4)
    assert statistics.entropy_ratio(counts) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    )
    assert statistics.idle(counts) == 2


@pytest.mark.parametrize("experts", [2, 8, 64])
def test_extremes(experts: int) -> None:
    even, single = np.full(experts, 7), np.eye(experts)[0] * 9
    assert statistics.imbalance(even) == 1
    assert statistics.imbalance(single) == experts
    assert statistics.gini(even) == pytest.approx(0)
    assert statistics.gini(single) == pytest.approx((experts - 1) / experts)
    assert statistics.entropy_ratio(even) == pytest.approx(1)
    assert statistics.entropy_ratio(single) == 0
    assert statistics.cv(single) == pytest.approx(math.sqrt(experts - 1))


def test_rows_are_independent_and_empty_ones_have_no_balance() -> None:
    counts = np.array([[3, 1], [0, 0]])
    for function in (statistics.imbalance, statistics.cv, statistics.gini, statistics.entropy_ratio):
        result = function(counts)
        assert result[0] == pytest.approx(float(function(counts[0])))
        assert math.isnan(result[1])
    with pytest.raises(ValueError, match="negative"):
        statistics.imbalance([1, -1])
    with pytest.raises(ValueError, match="at least one expert"):
        statistics.imbalance([])


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(64, 64, 8), (1024, 64, 8), (256, 8, 2), (2000, 256, 8)])
def test_the_floor_is_what_uniform_routing_shows(tokens: int, experts: int, top_k: int) -> None:
    """Monte Carlo: each token draws top_k distinct experts."""
    rng = np.random.default_rng(1)
    trials = 300
    ratios = []
    for _ in range(trials):
        chosen = np.argpartition(rng.random((tokens, experts)), top_k, axis=1)[:, :top_k]
        counts = np.bincount(chosen.ravel(), minlength=experts)
        ratios.append(counts.max() / counts.mean())
    error = np.std(ratios) / math.sqrt(trials)
    # loads are slightly negatively correlated, which the formula leaves out: at most 1 % here
    floor = statistics.imbalance_floor(tokens, experts, top_k)
    assert abs(floor - np.mean(ratios)) < 4 * error + 0.01 * floor


def test_the_floor_at_the_edges() -> None:
    assert math.isnan(statistics.imbalance_floor(0, 64, 8))
    assert statistics.imbalance_floor(1, 64, 8) == pytest.approx(
        8, rel=0.01
    )  # one token: an expert has 1 or 0, mean 1/8
    assert statistics.imbalance_floor(10**9, 64, 8) == pytest.approx(1, abs=1e-3)
    assert statistics.imbalance_floor(500, 8, 8) == 1
    with pytest.raises(ValueError, match="top_k"):
        statistics.imbalance_floor(10, 8, 9)
