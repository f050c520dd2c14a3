"""The meter: turns router logits and chosen experts into counter rows.

:func:`accumulate` is the reference, in plain torch, and what runs on CPUs. :class:`Meter` holds a model's rows and the
decisions of the step in progress. Serving code calls it through guards that catch whatever it raises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_monitor.layout import FIXED_POINT, HISTOGRAMS, SCALARS, RowLayout, edges

if TYPE_CHECKING:
    from moe_monitor.capture.tallies import HostTallies


class Decision(NamedTuple):
    """What one layer's router did in one pass: ``logits`` [tokens, experts], ``ids`` [tokens, k] logical expert ids.

    An id outside ``0..experts-1`` means "no expert" (some routers drop tokens that way).
    """

    layer: int
    logits: Tensor
    ids: Tensor


def probabilities(logits: Tensor, scoring: str) -> tuple[Tensor, Tensor]:
    """Routing distribution and its entropy in nats, over the last axis, in float32.

    softmax: p = softmax(logits). sigmoid: every expert scores on its own, so p = sigmoid(logits) / sum of them; the
    entropy then says how evenly the scores are spread. Rows with NaN, +inf or nothing but -inf give NaN.
    """
    x = logits.float()
    if scoring == "sigmoid":
        score = torch.sigmoid(x)
        total = score.sum(-1, keepdim=True)
        weighted = torch.where(score > 0, score * torch.nn.functional.logsigmoid(x), 0.0)
        p = score / total
        h = total.log().squeeze(-1) - (weighted / total).sum(-1)
        # +inf is no more a score here than it is under softmax
        return p, torch.where(torch.isposinf(x).any(-1), torch.nan, h)
    z = x - x.amax(-1, keepdim=True)
    e = z.exp()
    total = e.sum(-1, keepdim=True)
    p = e / total
    h = total.log().squeeze(-1) - torch.where(p > 0, p * z, 0.0).sum(-1)
    return p, torch.where(total.squeeze(-1).isnan(), torch.nan, h)


@dataclass(frozen=True)
class RowStats:
    """Per token and layer, ``[layers, tokens]`` each; ``finite`` tells where the three ratios mean something."""

    entropy: Tensor
    top1: Tensor
    mass: Tensor
    per_token: Tensor
    finite: Tensor


def row_stats(logits: Tensor, ids: Tensor, scoring: str) -> RowStats:
    """Entropy over ln(experts), top-1 probability, selected mass and experts of each token.

    ``logits`` [layers, tokens, experts], ``ids`` [layers, tokens, k].
    """
    experts = logits.shape[-1]
    p, h = probabilities(logits, scoring)
    finite = torch.isfinite(h)
    chosen = (ids >= 0) & (ids < experts)
    mass = (p.gather(-1, torch.where(chosen, ids, 0).long()) * chosen).sum(-1)
    scale = 1 / math.log(experts) if experts > 1 else 0.0
    return RowStats(
        entropy=(h * scale).clamp(0, 1),
        top1=p.amax(-1).clamp(0, 1),
        mass=mass.clamp(0, 1),
        per_token=chosen.sum(-1),
        finite=finite,
    )


def _histogram(values: Tensor, keep: Tensor, name: str) -> Tensor:
    """Bucket counts by layer: ``values`` and ``keep`` [layers, n] -> int64 [layers, buckets+1]."""
    bounds = torch.tensor(edges(name), dtype=torch.float32, device=values.device)
    width = len(bounds) + 1
    layers = values.shape[0]
    bucket = torch.bucketize(values.float(), bounds)  # first edge that is not below the value
    bucket = bucket + width * torch.arange(layers, device=values.device)[:, None]
    return torch.bincount(bucket[keep], minlength=layers * width).view(layers, width)


def fixed(values: Tensor) -> Tensor:
    """Ratios as int64 fixed point, rounded half up."""
    return (values * FIXED_POINT + 0.5).floor().long()


def accumulate(logits: Tensor, ids: Tensor, scoring: str, layout: RowLayout) -> Tensor:
    """The counter rows of one pass: ``logits`` [layers, tokens, experts], ``ids`` [layers, tokens, k].

    Only real tokens may be passed in. The result is int64 [layers, layout.width] and adds up over passes.
    """
    layers, tokens, experts = logits.shape
    stats = row_stats(logits, ids, scoring)
    everything = torch.ones_like(stats.finite)
    shifted = ids.long() + experts * torch.arange(layers, device=ids.device)[:, None, None]
    chosen = (ids >= 0) & (ids < experts)
    counts = torch.bincount(shifted[chosen], minlength=layers * experts).view(layers, experts)
    active = (counts > 0).sum(-1)

    def total(values: Tensor) -> Tensor:
        return torch.where(stats.finite, fixed(values), 0).sum(-1)

    columns = {
        "experts": counts,
        "entropy": _histogram(stats.entropy, stats.finite, "entropy"),
        "top1": _histogram(stats.top1, stats.finite, "top1"),
        "mass": _histogram(stats.mass, stats.finite, "mass"),
        "per_token": _histogram(stats.per_token, everything, "per_token"),
        "active": _histogram(active[:, None], everything[:, :1], "active"),
        "tokens": torch.full((layers,), tokens, device=ids.device),
        "passes": torch.ones(layers, dtype=torch.int64, device=ids.device),
        "nonfinite": (~stats.finite).sum(-1),
        "entropy_sum": total(stats.entropy),
        "top1_sum": total(stats.top1),
        "mass_sum": total(stats.mass),
        "per_token_sum": stats.per_token.sum(-1),
        "active_sum": active,
    }
    rows = torch.zeros((layers, layout.width), dtype=torch.int64, device=ids.device)
    for name, span in layout.offsets.items():
        rows[:, span] = columns[name][:, None] if name in SCALARS else columns[name]
    return rows


assert set(HISTOGRAMS) | set(SCALARS) | {"experts"} == set(RowLayout(1).offsets)


class Meter:
    """Counter rows of one model on one rank, for CPUs.

    ``observe`` collects the decisions of a pass, ``end_pass`` turns them into rows. Decisions are copied, because
    compiled code reuses the memory of logits as soon as the router has read them; when the copies of a pass grow
    beyond ``pending_limit`` bytes they are worked off early.

    ``rows`` is replaced, never written to, so another thread may take it at any moment.
    """

    def __init__(self, layers: Sequence[int], experts: int, scoring: str, pending_limit: int = 32 << 20) -> None:
        self.layers = tuple(layers)
        self.layout = RowLayout(experts)
        self.scoring = scoring
        self.rows: NDArray[np.int64] = np.zeros((len(self.layers), self.layout.width), dtype=np.int64)
        self.passes = 0
        #: Real tokens at the head of the rows that the routers see in this pass; 0 outside real passes.
        self.valid = 0
        self._pending: list[Decision] = []
        self._pending_bytes = 0
        self._pending_limit = pending_limit
        self._seen = np.zeros(len(self.layers), dtype=bool)
        #: Where traced requests are tallied; None where none are.
        self.tallies: HostTallies | None = None

    def begin_pass(self, tokens: int) -> None:
        """``tokens`` real tokens come first in every router's rows until :meth:`end_pass`."""
        self._pending.clear()
        self._pending_bytes = 0
        self._seen[:] = False
        self.valid = tokens

    def read_rows(self) -> NDArray[np.int64]:
        return self.rows

    @property
    def rows_now(self) -> NDArray[np.int64]:
        """The rows as they stand between two passes; never written to."""
        return self.rows

    def observe(self, layer: int, logits: Tensor, ids: Tensor) -> None:
        """Take one layer's decision; ``layer`` is a position in :attr:`layers`."""
        n = self.valid
        if n == 0:
            return
        if logits.shape[0] < n or ids.shape[0] < n:
            raise ValueError(f"layer {self.layers[layer]}: {n} tokens expected, the router saw {tuple(logits.shape)}")
        decision = Decision(layer, logits[:n].float().clone(), ids[:n].clone())
        self._pending.append(decision)
        self._pending_bytes += decision.logits.nbytes + decision.ids.nbytes
        if self._pending_bytes > self._pending_limit:
            self._work_off()

    def begin_dummy(self) -> None:
        """A pass that must not be counted is about to run."""
        self.valid = 0

    def end_pass(self) -> bool:
        """Count the pass. Returns whether every layer was seen exactly once (False: capture is not live)."""
        if self.valid == 0:
            return True
        self._work_off()
        self.valid = 0
        self.passes += 1
        return bool(self._seen.all())

    def _work_off(self) -> None:
        if not self._pending:
            return
        layers = [d.layer for d in self._pending]
        if self._seen[layers].any() or len(set(layers)) != len(layers):
            raise RuntimeError(f"a layer was routed twice in one pass: {[self.layers[i] for i in layers]}")
        logits = torch.stack([d.logits for d in self._pending])
        ids = torch.stack([d.ids for d in self._pending])
        rows = accumulate(logits, ids, self.scoring, self.layout)
        if self.tallies is not None:
            self.tallies.add(logits, ids, self.scoring, layers)
        fresh = self.rows.copy()
        fresh[layers] += rows.numpy()
        self.rows = fresh
        self._seen[layers] = True
        self._pending.clear()
        self._pending_bytes = 0
