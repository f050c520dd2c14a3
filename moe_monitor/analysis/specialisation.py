"""Routing research metrics as the OLMoE paper defines them (Muennighoff et al., arXiv 2409.02060, section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_monitor.analysis.records import Record

Floats = NDArray[np.float64]


def router_saturation(ids: Any, final_ids: Any, experts: int) -> Floats:
    """Share of a token's experts that are the same as at the final checkpoint, mean over tokens: 1 is settled.

    saturation(t) = 1/N * sum over tokens of |E_i(t) and E_i(T)| / k, for the same N tokens. ``ids`` and ``final_ids``
    [layers, tokens, k] -> [layers]. Uniform routing gives k/experts. Raises ValueError if shapes differ.
    """
    a, b = np.asarray(ids), np.asarray(final_ids)
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"both need one shape [layers, tokens, k], got {a.shape} and {b.shape}")
    real = (a >= 0) & (a < experts)
    common = ((a[..., :, None] == b[..., None, :]).any(axis=-1) & real).sum(axis=-1)
    return np.asarray(common.mean(axis=1) / a.shape[2])


def saturation_at_most(counts: Any, final_counts: Any) -> Floats:
    """The most that :func:`router_saturation` can be where only totals over the same tokens are known, [layers].

    ``counts`` and ``final_counts`` [layers, experts]. An expert cannot have kept more tokens than it had at either
    checkpoint: sum of the smaller counts over all assignments. Raises ValueError if the layers' totals differ.
    """
    a, b = np.asarray(counts, dtype=np.float64), np.asarray(final_counts, dtype=np.float64)
    if a.shape != b.shape or not np.array_equal(a.sum(axis=-1), b.sum(axis=-1)):
        raise ValueError("both need the counts of the same tokens")
    return np.asarray(np.minimum(a, b).sum(axis=-1) / a.sum(axis=-1))


def co_activation_bounds(counts: Any, tokens: Any) -> tuple[Floats, Floats]:
    """What :func:`co_activation` lies between where only totals are known, each [layers, experts (i), experts (j)].

    ``counts`` [layers, experts] tokens per expert, ``tokens`` [layers] or one number. Of N tokens at least
    N_i + N_j - N and at most the smaller of the two chose both. Rows of experts without tokens are NaN.
    """
    n = np.asarray(counts, dtype=np.float64)
    total = np.broadcast_to(np.asarray(tokens, dtype=np.float64), n.shape[:1])[:, None, None]
    low = np.maximum(0, n[:, :, None] + n[:, None, :] - total)
    high = np.minimum(n[:, :, None], n[:, None, :])
    own = np.eye(n.shape[1], dtype=bool)
    low = np.where(own, n[:, :, None], low)
    with np.errstate(invalid="ignore"):
        single = np.where(n > 0, n, np.nan)[..., None]
        return np.asarray(low / single), np.asarray(high / single)


def co_activation(record: Record) -> Floats:
    """How often expert j is active when expert i is: N_ij / N_i, [layers, experts (i), experts (j)].

    The diagonal is 1; a row of an expert that no token chose is NaN. This is the paper's formula; the script published
    with it counts neighbours in order of probability only.
    """
    chosen = record.chosen().astype(np.float64)
    together = np.einsum("lti,ltj->lij", chosen, chosen, optimize=True)
    single = np.diagonal(together, axis1=1, axis2=2)
    with np.errstate(invalid="ignore"):
        return np.asarray(together / np.where(single > 0, single, np.nan)[..., None])


def domain_specialisation(counts: Any, tokens: Any) -> Floats:
    """Share of a domain's tokens for which an expert is among the chosen k: N_(E,D) / N_D.

    ``counts`` [..., layers, experts] tokens per expert, ``tokens`` [...] tokens of the domain; the result is shaped
    as ``counts``.
    Uniform routing gives k/experts; over experts it sums to k.
    """
    n = np.asarray(tokens, dtype=np.float64)
    if (n <= 0).any():
        raise ValueError("a domain without tokens has no specialisation")
    return np.asarray(np.asarray(counts, dtype=np.float64) / n[..., None, None])


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary specialisation of one layer. ``token_ids`` [n] distinct ids, ``seen`` [n] how often each occurred,
    ``share`` [n, experts] share of a token id's routings that went to an expert (rows sum to 1)."""

    token_ids: NDArray[np.int64]
    seen: NDArray[np.int64]
    share: Floats

    def mean(self, least: int = 1) -> float:
        """Mean over token ids (seen at least ``least`` times) of their most used expert's share; NaN without any."""
        kept = self.seen >= least
        return float(self.share[kept].max(axis=1).mean()) if kept.any() else float("nan")

    def of_expert(self, expert: int, least: int = 10, top: int = 15) -> list[tuple[int, float]]:
        """(token id, share) for which this expert is the most used, highest share first."""
        mine = np.flatnonzero((self.share.argmax(axis=1) == expert) & (self.seen >= least))
        best = mine[np.argsort(-self.share[mine, expert], kind="stable")][:top]
        return [(int(self.token_ids[i]), float(self.share[i, expert])) for i in best]


def vocabulary_specialisation(record: Record, layer: int, *, top: int = 1, token_ids: Any = None) -> Vocabulary:
    """Share of a token id's routings that go to an expert: N_(x,E) / N_x, N_x over all experts.

    ``layer`` is a model layer index; ``top`` how many of the chosen experts count, likeliest first (the paper's tables
    use 1). ``token_ids`` [tokens]: other ids than the input's, for example the predicted ones. Tokens without id (-1)
    are left out.
    """
    at = record.layers.index(layer)
    names = record.token_ids if token_ids is None else np.asarray(token_ids)
    p = np.where(record.chosen()[at], record.probabilities[at], -1.0)
    best = np.argsort(-p, axis=1, kind="stable")[:, :top]
    valid = (np.take_along_axis(p, best, axis=1) >= 0) & (names >= 0)[:, None]
    distinct, inverse = np.unique(names, return_inverse=True)
    table = np.zeros((len(distinct), record.experts), dtype=np.int64)
    rows = np.broadcast_to(inverse.reshape(-1, 1), best.shape)
    np.add.at(table, (rows[valid], best[valid]), 1)
    routed = table.sum(axis=1)
    seen = np.bincount(inverse.reshape(-1), minlength=len(distinct))
    kept = (distinct >= 0) & (routed > 0)
    return Vocabulary(
        token_ids=distinct[kept].astype(np.int64),
        seen=seen[kept].astype(np.int64),
        share=table[kept] / routed[kept, None],
    )
