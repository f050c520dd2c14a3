"""Counting: the decisions of a pass become counter rows, on the device where they were made.

torch.compile cannot look into :func:`count_pass`: it is a custom operator that changes ``rows`` in place, so a
compiled graph keeps it, does not break at it, and runs it each time. It does only device work on CUDA (no
synchronisation, no host decision), so that CUDA graphs replay it.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_monitor.capture.meter import accumulate, fixed, row_stats
from moe_monitor.layout import SCALARS, RowLayout, edges

#: Most bytes of logits that are stacked at once.
CHUNK_BYTES = 64 << 20

#: Running sessions by number: a compiled graph can only carry plain values.
SESSIONS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


_BOUNDS: dict[tuple[str, torch.device], Tensor] = {}


def bounds(name: str, device: torch.device) -> Tensor:
    """Bucket bounds on a device, made once: a CUDA graph cannot capture a copy from ordinary host memory."""
    key = (name, device)
    if key not in _BOUNDS:
        with torch.inference_mode(mode=False):
            _BOUNDS[key] = torch.tensor(edges(name), dtype=torch.float32, device=device)
    return _BOUNDS[key]


class Stream(NamedTuple):
    """The tokens of a pass: ``real`` bool [tokens] (None: all), their ids [tokens] (None: embeddings were given), and
    how many sequences of equal length they make up, one after the other."""

    real: Tensor | None
    tokens: Tensor | None
    batch: int


def accumulate_masked(logits: Tensor, ids: Tensor, real: Tensor, scoring: str, layout: RowLayout) -> Tensor:
    """What :func:`moe_monitor.capture.meter.accumulate` gives for the rows where ``real``, without synchronisation.

    ``logits`` [layers, tokens, experts], ``ids`` [layers, tokens, k], ``real`` bool [tokens] -> int64 [layers, width].
    ``bincount`` and boolean indexing wait for the device to learn their result's size; this scatters instead. What
    costs is the number of kernels, not their size, so all columns that count go into one scatter.
    """
    layers, _, experts = logits.shape
    stats = row_stats(logits, ids, scoring)
    real = real.expand(layers, -1)
    finite = stats.finite & real
    chosen = (ids >= 0) & (ids < experts) & real[..., None]
    at = layout.offsets
    ratios = torch.stack((stats.entropy, stats.top1, stats.mass)).nan_to_num()

    def bucket(values: Tensor, name: str) -> Tensor:
        return torch.bucketize(values, bounds(name, values.device)) + at[name].start

    columns = [torch.where(chosen, ids, 0).flatten(1)]  # experts come first
    columns += [bucket(values, name) for values, name in zip(ratios, ("entropy", "top1", "mass"), strict=True)]
    columns.append(bucket(stats.per_token.float(), "per_token"))
    weights = torch.cat((chosen.flatten(1), finite, finite, finite, real), dim=1)
    rows = torch.zeros((layers, layout.width), dtype=torch.int64, device=ids.device)
    rows.scatter_add_(1, torch.cat(columns, dim=1), weights.long())
    active = (rows[:, at["experts"]] > 0).sum(-1)
    ran = real.any(-1).long()
    rows.scatter_add_(1, bucket(active.float(), "active")[:, None], ran[:, None])
    entropy, top1, mass = torch.where(finite, fixed(ratios), 0).sum(-1)
    tokens = real.sum(-1)
    scalars = {
        "tokens": tokens,
        "passes": ran,
        "nonfinite": tokens - finite.sum(-1),
        "entropy_sum": entropy,
        "top1_sum": top1,
        "mass_sum": mass,
        "per_token_sum": chosen.sum((1, 2)),
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
        else:
            logits, ids = [x[real] for x in logits], [x[real] for x in ids]
    if on_cpu and logits[0].shape[0] == 0:
        return None
    if not on_cpu and real is None:
        real = torch.ones(logits[0].shape[0], dtype=torch.bool, device=logits[0].device)
    step = max(1, CHUNK_BYTES // max(1, 4 * logits[0].numel()))
    parts = []
    for at in range(0, len(logits), step):
        stack = torch.stack(logits[at : at + step]).float()
        chosen = torch.stack(ids[at : at + step])
        if on_cpu:
            parts.append(accumulate(stack, chosen, scoring, layout))
        else:
            assert real is not None
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
