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
    if (loads < 0).any():
        raise ValueError("counts must not be negative")
    mean = loads.mean(axis=-1)
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
