"""How long sampled steps and their MoE layers took: what workers add up, and how it travels on the board.

One :class:`LatencyTable` per worker rank. Durations are whole nanoseconds, so sums are exact and add over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_monitor.board import ArraySpec
from moe_monitor.catalog import (
    LAYER_KINDS,
    LAYER_SECONDS_BUCKETS,
    STAGES,
    STEP_KINDS,
    STEP_SECONDS_BUCKETS,
    STEP_TOKENS_BUCKETS,
)
from moe_monitor.costmodel import CostModel

SEGMENT = "latency"

#: The last sampled steps that ranks are compared over.
RECENT = 64

_LAYER_EDGES = np.array([round(1e9 * s) for s in LAYER_SECONDS_BUCKETS], dtype=np.int64)
_STEP_EDGES = np.array([round(1e9 * s) for s in STEP_SECONDS_BUCKETS], dtype=np.int64)
_TOKEN_EDGES = np.array(STEP_TOKENS_BUCKETS, dtype=np.int64)


def latency_segment(layers: int) -> dict[str, ArraySpec]:
    """The arrays of the board's segment :data:`SEGMENT`."""
    stages, kinds, split = len(STAGES), len(STEP_KINDS), len(LAYER_KINDS)
    return {
        "layer": ("<i8", (layers, stages, split, len(_LAYER_EDGES) + 1)),
        "layer_ns": ("<i8", (layers, stages, split)),
        "flops": ("<i8", (layers, split)),
        "step": ("<i8", (kinds, len(_STEP_EDGES) + 1)),
        "step_ns": ("<i8", (kinds,)),
        "tokens": ("<i8", (kinds, len(_TOKEN_EDGES) + 1)),
        "tokens_sum": ("<i8", (kinds,)),
        "timed_ns": ("<i8", (kinds,)),  # steps whose layers were timed
        "moe_ns": ("<i8", (kinds,)),  # their MoE layers
        "cost": ("<f8", (2, layers)),  # modelled seconds: observed load, balanced load
        "cost_error": ("<f8", (1,)),
        "recent_pass": ("<i8", (RECENT,)),  # number of the pass, 0 where there is none
        "recent_experts_ns": ("<i8", (RECENT,)),  # its experts stages, all layers of the rank
    }


@dataclass(frozen=True)
class SampledStep:
    """One timed forward pass of a rank.

    number: of the pass on this rank, from 1; ranks of an engine number alike. kind: position in STEP_KINDS.
    nanoseconds: of the whole pass. stages: int64 [layers, len(STAGES)] nanoseconds, negative where not timed.
    counts: tokens per [layer, expert] of the experts on this rank, None where not known.
    flops: of the expert GEMMs of this rank per layer, None where not known.
    """

    number: int
    kind: int
    tokens: int
    nanoseconds: int
    stages: NDArray[np.int64] | None = None
    counts: NDArray[np.int64] | None = None
    flops: NDArray[np.int64] | None = None


@dataclass
class LatencyTable:
    """Sums over sampled steps. Not thread-safe."""

    layers: int
    arrays: dict[str, NDArray[Any]] = field(init=False)
    steps: int = 0
    _timed: int = 0

    def __post_init__(self) -> None:
        self.arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in latency_segment(self.layers).items()}
        self.arrays["cost_error"][:] = np.nan
        self._model = CostModel(self.layers)

    def add(self, step: SampledStep) -> None:
        """Raises ValueError for stages or counts of another shape."""
        a, kind = self.arrays, step.kind
        a["step"][kind, np.searchsorted(_STEP_EDGES, step.nanoseconds)] += 1
        a["step_ns"][kind] += step.nanoseconds
        a["tokens"][kind, np.searchsorted(_TOKEN_EDGES, step.tokens)] += 1
        a["tokens_sum"][kind] += step.tokens
        self.steps += 1
        if step.stages is None:
            return
        if step.stages.shape != (self.layers, len(STAGES)):
            raise ValueError(f"stages have shape {step.stages.shape}, expected {(self.layers, len(STAGES))}")
        split = min(kind, len(LAYER_KINDS) - 1)
        timed = step.stages >= 0
        layer, stage = np.nonzero(timed)
        buckets = np.searchsorted(_LAYER_EDGES, step.stages[timed])
        a["layer"][layer, stage, split, buckets] += 1  # no two of them are of one layer and stage
        a["layer_ns"][:, :, split] += np.where(timed, step.stages, 0)
        experts = step.stages[:, STAGES.index("experts")]
        if timed.all():
            a["timed_ns"][kind] += step.nanoseconds
            a["moe_ns"][kind] += step.stages[:, STAGES.index("layer")].sum()
            at = self._timed % RECENT
            a["recent_pass"][at], a["recent_experts_ns"][at] = step.number, experts.sum()
            self._timed += 1
        if step.flops is not None:
            a["flops"][:, split] += np.where(experts >= 0, step.flops, 0)
        if step.counts is not None:
            self._model.add(step.counts, np.where(experts >= 0, experts, np.nan) / 1e9)
            a["cost"][:] = self._model.observed, self._model.level
            a["cost_error"][0] = self._model.error


@dataclass(frozen=True)
class RankLatency:
    """One rank's table as read from its board. ``ep_rank`` None without expert parallelism."""

    layers: tuple[int, ...]
    arrays: Mapping[str, NDArray[Any]]
    ep_rank: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for arrays of another form."""
        for name, (dtype, shape) in latency_segment(len(self.layers)).items():
            array = self.arrays[name]
            if array.dtype != np.dtype(dtype) or array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}")


@dataclass(frozen=True)
class EngineLatency:
    """An engine's ranks together: sums as in :func:`latency_segment` over ``layers``, sorted.

    cost: estimated experts time over that of a balanced load, per layer, NaN where not known. error: of that estimate,
    NaN likewise. experts_ns: expert-parallel rank -> nanoseconds in experts stages. wait: expert-parallel rank -> share
    of the slowest rank's time that it waits, over the last steps that all ranks timed; empty where there are none.
    """

    layers: tuple[int, ...]
    arrays: dict[str, NDArray[Any]]
    cost: NDArray[np.float64]
    error: float
    experts_ns: dict[int, int]
    wait: dict[int, float]


_BY_LAYER = ("layer", "layer_ns", "flops")
_BY_STEP = ("step", "step_ns", "tokens", "tokens_sum", "timed_ns", "moe_ns")


def merge(ranks: Iterable[RankLatency]) -> EngineLatency | None:
    """The ranks of one engine as one; None without ranks.

    Layer durations of all ranks are added up: each rank's layer is a sample of its own. A step is all ranks' at
    once: its time is taken from the ranks that have the first layer of all (pipeline stages time their own parts).
    """
    ranks = list(ranks)
    if not ranks:
        return None
    layers = tuple(sorted({layer for rank in ranks for layer in rank.layers}))
    place = {layer: i for i, layer in enumerate(layers)}
    arrays: dict[str, NDArray[Any]] = {
        name: np.zeros(shape, dtype) for name, (dtype, shape) in latency_segment(len(layers)).items()
    }
    observed, level = np.zeros((len(ranks), len(layers))), np.zeros((len(ranks), len(layers)))
    for i, rank in enumerate(ranks):
        at = [place[layer] for layer in rank.layers]
        for name in _BY_LAYER:
            arrays[name][at] += rank.arrays[name]
        observed[i, at], level[i, at] = rank.arrays["cost"]
        if layers and layers[0] in rank.layers:
            for name in _BY_STEP:
                arrays[name] += rank.arrays[name]
    by_ep = {rank.ep_rank: rank for rank in ranks if rank.ep_rank is not None}
    if len(by_ep) > 1:  # the layer is as slow as its slowest rank, and balanced when each has its share
        above, below = observed.max(axis=0), level.mean(axis=0)
    else:
        above, below = observed.sum(axis=0), level.sum(axis=0)
    errors = [e for rank in ranks if (e := float(rank.arrays["cost_error"][0])) == e]
    return EngineLatency(
        layers,
        arrays,
        cost=np.where(below > 0, above / np.where(below > 0, below, 1), np.nan),
        error=max(errors, default=float("nan")),
        experts_ns={ep: int(r.arrays["layer_ns"][:, STAGES.index("experts")].sum()) for ep, r in sorted(by_ep.items())},
        wait=_wait(by_ep),
    )


def _wait(by_ep: Mapping[int, RankLatency]) -> dict[int, float]:
    if len(by_ep) < 2:
        return {}
    steps = {
        ep: dict(zip(r.arrays["recent_pass"].tolist(), r.arrays["recent_experts_ns"].tolist(), strict=True))
        for ep, r in by_ep.items()
    }
    common = set.intersection(*(set(times) for times in steps.values())) - {0}
    slowest = {n: max(times[n] for times in steps.values()) for n in common}
    total = sum(slowest.values())
    if not total:
        return {}
    return {ep: sum(slowest[n] - times[n] for n in common) / total for ep, times in sorted(steps.items())}
