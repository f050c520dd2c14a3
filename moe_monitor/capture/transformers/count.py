"""Counting: the decisions of a pass become counter rows, on the device where they were made.

torch.compile cannot look into :func:`count_pass`: it is a custom operator that changes ``rows`` in place, so a
compiled graph keeps it, does not break at it, and runs it each time. It does only device work on CUDA (no
synchronisation, no host decision), so that CUDA graphs replay it.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_monitor.capture.meter import fixed, probabilities
from moe_monitor.layout import HISTOGRAMS, SCALARS, RowLayout, edges

#: Most bytes of logits that are stacked at once.
CHUNK_BYTES = 64 << 20

#: Running sessions by number: a compiled graph can only carry plain values.
SESSIONS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class Tables(NamedTuple):
    """What turns values into columns of a row, on a device: bucket bounds of the three ratios and the first column of
    each [3, 1]; and the column for every number of experts per token [k+1], and of active experts [experts+1]."""

    ratios: tuple[Tensor, ...]
    starts: Tensor
    per_token: Tensor
    active: Tensor


RATIOS = ("entropy", "top1", "mass")
_TABLES: dict[tuple[int, int, torch.device], Tables] = {}


def tables(layout: RowLayout, top_k: int, device: torch.device) -> Tables:
    """Made once: a CUDA graph cannot capture a copy from ordinary host memory."""
    key = (layout.experts, top_k, device)
    if key not in _TABLES:
        with torch.inference_mode(mode=False):
            first = {name: layout.offsets[name].start for name in HISTOGRAMS}

            def bounds(name: str) -> Tensor:
                return torch.tensor(edges(name), dtype=torch.float32, device=device)

            def columns(name: str, most: int) -> Tensor:
                return torch.bucketize(torch.arange(most + 1.0, device=device), bounds(name)) + first[name]

            _TABLES[key] = Tables(
                ratios=tuple(bounds(name) for name in RATIOS),
                starts=torch.tensor([[first[name]] for name in RATIOS], device=device),
                per_token=columns("per_token", top_k),
                active=columns("active", layout.experts),
            )
    return _TABLES[key]


class Stream(NamedTuple):
    """The tokens of a pass: ``real`` bool [tokens] (None: all), their ids [tokens] (None: embeddings were given), and
    how many sequences of equal length they make up, one after the other."""

    real: Tensor | None
    tokens: Tensor | None
    batch: int


def accumulate_masked(logits: Tensor, ids: Tensor, real: Tensor | None, scoring: str, layout: RowLayout) -> Tensor:
    """What :func:`moe_monitor.capture.meter.accumulate` gives for the rows where ``real``, without synchronisation.

    ``logits`` [layers, tokens, experts], ``ids`` [layers, tokens, k], ``real`` bool [tokens], None if all are ->
    int64 [layers, width]. ``bincount`` and boolean indexing wait for the device to learn their result's size; this
    scatters instead. What costs is the number of operations, not their size, so all columns that count go into one
    scatter, and numbers of experts find their columns in tables.
    """
    layers, tokens, experts = logits.shape
    table = tables(layout, ids.shape[-1], ids.device)
    p, entropy = probabilities(logits, scoring)
    finite = entropy == entropy  # the entropy is finite or NaN
    chosen = (ids >= 0) & (ids < experts)
    expert = torch.where(chosen, ids, 0).long()
    mass = (p.gather(-1, expert) * chosen).sum(-1)
    per_token = chosen.sum(-1)
    scale = 1 / math.log(experts) if experts > 1 else 0.0
    ratios = torch.stack((entropy * scale, p.amax(-1), mass)).clamp(0, 1)  # [3, layers, tokens]
    if real is None:
        counted = torch.ones_like(finite)
        seen = torch.full((layers,), tokens, device=ids.device)
        ran = torch.full((layers,), min(tokens, 1), device=ids.device)
    else:
        counted = real.expand(layers, -1)
        seen, ran = counted.sum(-1), counted.any(-1).long()
        finite, chosen = finite & real, chosen & real[:, None]
    chosen = chosen.flatten(1)
    buckets = [torch.bucketize(x, bounds) for x, bounds in zip(ratios, table.ratios, strict=True)]
    buckets = [expert.flatten(1), (torch.stack(buckets, 1) + table.starts).flatten(1), table.per_token.take(per_token)]
    rows = torch.zeros((layers, layout.width), dtype=torch.int64, device=ids.device)
    weights = torch.cat((chosen, finite, finite, finite, counted), dim=1).long()
    rows.scatter_add_(1, torch.cat(buckets, dim=1), weights)
    active = (rows[:, :experts] > 0).sum(-1)
    rows.scatter_add_(1, table.active.take(active)[:, None], ran[:, None])
    sums = torch.where(finite, fixed(ratios), 0).sum(-1)
    scalars = {
        "tokens": seen,
        "passes": ran,
        "nonfinite": seen - finite.sum(-1),
        **{f"{name}_sum": total for name, total in zip(RATIOS, sums, strict=True)},
        "per_token_sum": chosen.sum(-1),
        "active_sum": active,
    }
    rows[:, layout.at(SCALARS[0]) :] = torch.stack([scalars[name] for name in SCALARS], dim=1)
    return rows


def load_of(ids: list[Tensor], experts: int) -> Tensor:
    """All that a pass computed, padding included: ``ids`` [tokens, k] of each layer -> int64 [layers, experts]."""
    stack = torch.stack(ids)
    chosen = (stack >= 0) & (stack < experts)
    counts = torch.zeros((len(ids), experts), dtype=torch.int64, device=stack.device)
    return counts.scatter_add_(1, torch.where(chosen, stack, 0).long().flatten(1), chosen.long().flatten(1))


def rows_of_pass(
    logits: list[Tensor], ids: list[Tensor], real: Tensor | None, scoring: str, layout: RowLayout
) -> Tensor | None:
    """Counter rows [layers, width] of one pass; None if it had no real token (known on CPUs only)."""
    on_cpu = logits[0].device.type == "cpu"
    if on_cpu and real is not None:
        if not real.any():
            return None
        if real.all():
            real = None
    if on_cpu and logits[0].shape[0] == 0:
        return None
    step = max(1, CHUNK_BYTES // max(1, 4 * logits[0].numel()))
    parts = []
    for at in range(0, len(logits), step):
        stack = torch.stack(logits[at : at + step]).float()
        chosen = torch.stack(ids[at : at + step])
        if on_cpu and real is not None:  # what is padding need not be computed
            parts.append(accumulate_masked(stack[:, real], chosen[:, real], None, scoring, layout))
        else:
            parts.append(accumulate_masked(stack, chosen, real, scoring, layout))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@torch.library.custom_op("moe_monitor::count_pass", mutates_args=("rows",))
def count_pass(
    rows: Tensor,
    logits: list[Tensor],
    ids: list[Tensor],
    real: Tensor | None,
    tokens: Tensor | None,
    *,
    batch: int,
    session: int,
) -> None:
    """Add one pass to ``rows`` on behalf of a session that may have ended meanwhile."""
    owner = SESSIONS.get(session)
    if owner is not None:
        owner.count(rows, logits, ids, Stream(real, tokens, batch))


@count_pass.register_fake
def _(
    rows: Tensor,
    logits: list[Tensor],
    ids: list[Tensor],
    real: Tensor | None,
    tokens: Tensor | None,
    *,
    batch: int,
    session: int,
) -> None:
    """Nothing to return, so nothing to describe to the compiler."""
