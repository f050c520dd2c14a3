"""Balance of expert load: pure numpy, no state.

``counts`` is always an array of shape ``[..., experts]`` of non-negative token counts; results drop the last axis.
Where there are no tokens the result is NaN: no load is neither balanced nor imbalanced.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def _loads(counts: Any) -> tuple[Floats, Floats]:
    """Counts as float64 with empty rows turned into NaN, and their mean over experts."""
    loads = np.asarray(counts, dtype=np.float64)
    if loads.ndim == 0 or loads.shape[-1] == 0:
        raise ValueError(f"counts need a last axis of at least one expert, got shape {loads.shape}")
    if loads.min(initial=0.0) < 0:
        raise ValueError("counts must not be negative")
    mean = loads.sum(axis=-1) / loads.shape[-1]  # as mean() does, in a quarter of its time
    return loads, np.where(mean > 0, mean, np.nan)


def imbalance(counts: Any) -> Floats:
    """Load of the busiest expert over the mean: 1 is balanced, ``experts`` is everything on one."""
    loads, mean = _loads(counts)
    return np.asarray(loads.max(axis=-1) / mean)


def cv(counts: Any) -> Floats:
    """Coefficient of variation: population standard deviation over mean."""
    loads, mean = _loads(counts)
    return np.asarray(loads.std(axis=-1) / mean)


def gini(counts: Any) -> Floats:
    """Gini coefficient, 0 to (experts-1)/experts, by the sorted-rank form of the mean absolute difference."""
    loads, mean = _loads(counts)
    n = loads.shape[-1]
    rank = np.arange(1, n + 1)
    return np.asarray(((2 * rank - n - 1) * np.sort(loads, axis=-1)).sum(axis=-1) / (n * n * mean))


def entropy_ratio(counts: Any) -> Floats:
    """Shannon entropy of the load's distribution over ln(experts). One expert alone is balanced: 1."""
    loads, mean = _loads(counts)
    n = loads.shape[-1]
    if n == 1:
        return np.asarray(mean / mean)
    share = loads / (mean * n)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(share == 0, 0.0, share * np.log(share))
    # abs: the sum of a one-expert load is -0.0
    return np.asarray(np.abs(terms.sum(axis=-1)) / math.log(n))


def idle(counts: Any) -> NDArray[np.int64]:
    """Experts without a token."""
    return np.asarray((np.asarray(counts) == 0).sum(axis=-1), dtype=np.int64)


def imbalance_floor(tokens: float, experts: int, top_k: int) -> float:
    """Expected :func:`imbalance` when ``tokens`` tokens each choose ``top_k`` of ``experts`` uniformly at random.

    An expert's load is then Binomial(tokens, top_k/experts), and E[max] = sum over t of 1 - F(t)^experts with the
    loads taken as independent (they are slightly negatively correlated, so the true value lies a little below).
    NaN without tokens. Token counts are rounded to three significant digits, so that repeated calls are cheap.
    """
    if experts < 1 or not 0 < top_k <= experts:
        raise ValueError(f"top_k must lie in 1..experts, got top_k={top_k}, experts={experts}")
    if not tokens >= 1:
        return math.nan
    digits = max(0, int(math.log10(tokens)) - 2)
    return _imbalance_floor(round(tokens / 10**digits) * 10**digits, experts, top_k)


@lru_cache(maxsize=8192)
def _imbalance_floor(tokens: int, experts: int, top_k: int) -> float:
    p = top_k / experts
    if p == 1:
        return 1.0
    mean = tokens * p
    reach = 12 * math.sqrt(mean * (1 - p)) + 12
    low, high = max(0, int(mean - reach)), min(tokens, int(mean + reach) + 1)
    t = np.arange(low, high, dtype=np.float64)
    # log pmf up to a constant, by the ratio of neighbours: no factorials, no overflow
    log_pmf = np.concatenate([[0.0], np.cumsum(np.log((tokens - t) / (t + 1)) + math.log(p / (1 - p)))])
    pmf = np.exp(log_pmf - log_pmf.max())
    cdf = np.minimum(np.cumsum(pmf) / pmf.sum(), 1.0)
    expected_max = low + float((1 - cdf**experts).sum())
    return expected_max / mean


def cv_floor(tokens: Any, experts: int, top_k: int) -> Floats:
    """Root of the expected squared :func:`cv` when ``tokens`` tokens each choose ``top_k`` experts uniformly.

    Exact: a load is Binomial(tokens, p) with p = top_k/experts, so var/mean^2 = (1 - p) / (tokens * p).
    """
    p = top_k / experts
    n = np.asarray(tokens, dtype=np.float64)
    return np.asarray(np.sqrt((1 - p) / (np.where(n > 0, n, np.nan) * p)))


def js_divergence(a: Any, b: Any) -> Floats:
    """Jensen-Shannon divergence in bits between the distributions of two counts: 0 the same, 1 nothing in common.

    Lin, "Divergence measures based on the Shannon entropy", 1991. NaN where either has no tokens.
    """
    p, q = (_shares(x) for x in (a, b))
    middle = (p + q) / 2
    # abs: equal distributions may come out as -1e-17
    return np.asarray(np.abs(_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2)


def js_floor(assignments: Any, counts: Any, per_token: Any) -> Floats:
    """Expected :func:`js_divergence` from ``counts`` of as many assignments drawn from that very distribution.

    ``assignments``: [...] how many expert choices were drawn; ``counts``: [..., experts], the distribution, itself
    known from that many; ``per_token``: experts per token, which a token chooses without repetition.
    The divergence is a sum over experts, so its expectation needs each expert's own distribution only: Poisson with
    mean assignments*share, its variance cut by 1 - per_token*share because a token takes an expert once at most.
    The counts' own sampling adds the same with their own total.
    """
    share = _shares(counts)
    drawn = np.asarray(assignments, dtype=np.float64)
    known = np.asarray(counts, dtype=np.float64).sum(axis=-1)
    once = np.clip(1 - np.asarray(per_token, dtype=np.float64)[..., None] * share, 0.0, 1.0)
    total = np.zeros(np.broadcast_shapes(drawn.shape, known.shape))
    for n in (drawn, known):
        expected = np.where(n > 0, n, np.nan)[..., None] * share
        total = total + (share * once * _poisson_js(expected)).sum(axis=-1)
    return np.asarray(total)


def _shares(counts: Any) -> Floats:
    loads, mean = _loads(counts)
    return np.asarray(loads / (mean * loads.shape[-1])[..., None])


def _relative_entropy(p: Floats, q: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(p == 0, 0.0, p * np.log2(p / q)).sum(axis=-1))


def _poisson_js(expected: Floats) -> Floats:
    """E[g(X/m)] for X ~ Poisson(m): an expert's part of the divergence in units of its share. By table below 1,000.

    g(a) = (a log2(2a/(a+1)) + log2(2/(a+1))) / 2; g(1+d) = d^2 / (8 ln 2) for small d, hence 1/(8 m ln 2) above.
    """
    grid, value = _poisson_js_table()
    with np.errstate(divide="ignore"):
        logarithm = np.log(expected)
    small = np.exp(np.interp(logarithm, grid, value))
    with np.errstate(divide="ignore"):
        large = 1 / (8 * math.log(2) * expected)
    return np.asarray(np.where(expected < math.exp(grid[-1]), small, large))


@lru_cache(maxsize=1)
def _poisson_js_table() -> tuple[Floats, Floats]:
    grid = np.linspace(math.log(1e-4), math.log(1e3), 161)
    values = []
    for mean in np.exp(grid):
        x = np.arange(0, math.ceil(mean + 12 * math.sqrt(mean) + 20), dtype=np.float64)
        log_pmf = np.concatenate([[0.0], np.cumsum(math.log(mean) - np.log(x[1:]))]) - mean
        a = x / mean
        with np.errstate(divide="ignore", invalid="ignore"):
            g = (np.where(a == 0, 0.0, a * np.log2(2 * a / (a + 1))) + np.log2(2 / (a + 1))) / 2
        values.append(float((np.exp(log_pmf) * g).sum()))
    return grid, np.log(values)
