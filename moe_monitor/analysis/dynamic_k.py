"""What k would another rule have chosen? Answered from recorded probabilities, without changing the model.

Every rule takes probabilities of shape [..., experts] that sum to 1 and gives an int64 array [...] of how many of the
likeliest experts it would use, at least ``least`` and at most ``most``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_monitor.analysis.summary import describe

Ints = NDArray[np.int64]


def _sorted(probabilities: Any) -> NDArray[np.float64]:
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim == 0 or p.shape[-1] == 0:
        raise ValueError(f"probabilities need a last axis of at least one expert, got shape {p.shape}")
    return -np.sort(-p, axis=-1)


def _bounded(k: Any, experts: int, least: int, most: int | None) -> Ints:
    most = experts if most is None else most
    if not 1 <= least <= most <= experts:
        raise ValueError(f"1 <= least <= most <= {experts} must hold, got least={least}, most={most}")
    return np.clip(np.asarray(k, dtype=np.int64), least, most)


def by_threshold(probabilities: Any, threshold: float, *, least: int = 1, most: int | None = None) -> Ints:
    """Experts whose probability is at least ``threshold``."""
    p = _sorted(probabilities)
    return _bounded((p >= threshold).sum(axis=-1), p.shape[-1], least, most)


def by_mass(probabilities: Any, mass: float, *, least: int = 1, most: int | None = None) -> Ints:
    """Fewest experts whose probabilities add up to at least ``mass`` (top-p); rounding errors of 1e-6 are forgiven."""
    p = _sorted(probabilities)
    return _bounded((np.cumsum(p, axis=-1) < mass - 1e-6).sum(axis=-1) + 1, p.shape[-1], least, most)


def by_gap(probabilities: Any, *, least: int = 1, most: int | None = None) -> Ints:
    """Experts above the largest drop between neighbours in sorted order, among drops after ``least`` to ``most``."""
    p = _sorted(probabilities)
    experts = p.shape[-1]
    _bounded(1, experts, least, most)
    if experts == 1:
        return np.ones(p.shape[:-1], dtype=np.int64)
    last = min(experts - 1 if most is None else most, experts - 1)
    drops = p[..., least - 1 : last] - p[..., least : last + 1]
    if drops.shape[-1] == 0:
        return np.full(p.shape[:-1], least, dtype=np.int64)
    return np.asarray(drops.argmax(axis=-1) + least, dtype=np.int64)


def effect(probabilities: Any, k: Any, top_k: int) -> list[dict[str, Any]]:
    """What a rule's choice means per layer, against the model's fixed ``top_k``.

    probabilities [layers, tokens, experts], k [layers, tokens]. Per layer: mean, std and quantiles of k, how many
    tokens chose each k (index 0 is k=0), probability mass that it covers (mean), and expert FLOPs over the model's.
    """
    p = _sorted(probabilities)
    chosen = np.asarray(k, dtype=np.int64)
    covered = np.take_along_axis(np.cumsum(p, axis=-1), chosen[..., None] - 1, axis=-1)[..., 0]
    return [
        {
            **{f"k_{name}": value for name, value in describe(chosen[i]).items()},
            "k_counts": np.bincount(chosen[i], minlength=p.shape[-1] + 1).tolist(),
            "mass_ratio_mean": float(covered[i].mean()),
            "expert_flops_ratio": float(chosen[i].mean() / top_k),
        }
        for i in range(p.shape[0])
    ]
