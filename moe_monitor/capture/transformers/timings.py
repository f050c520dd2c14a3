"""From the clock to the board: timed passes become the table of durations that readers see."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe_monitor.capture.transformers.latency import Clock, TimedPass
from moe_monitor.catalog import STEP_KINDS
from moe_monitor.latency import EngineLatency, LatencyTable, RankLatency, SampledStep, merge

#: Passes that the table takes between two collections; those above are timed, but only summaries show them. It bounds
#: what a stream of very short passes can cost the thread that publishes.
PER_ROUND = 32

DECODE, PREFILL, MIXED = (STEP_KINDS.index(kind) for kind in ("decode", "prefill", "mixed"))


def kind_of(kind: int | Tensor) -> int:
    """Position in STEP_KINDS, where needed from the cumulative lengths [requests+1] of a continuous batch."""
    if isinstance(kind, int):
        return kind
    lengths = np.diff(kind.cpu().numpy())
    lengths = lengths[lengths > 0]
    return DECODE if (lengths <= 1).all() else PREFILL if (lengths > 1).all() else MIXED


class Timings:
    """The durations of one session as the publisher and :meth:`Monitor.snapshot` want them.

    ``flops``: of one token in one expert.
    """

    def __init__(self, layers: tuple[int, ...], experts: int, flops: int) -> None:
        self._layers, self._experts, self._flops = layers, experts, flops
        self._lock = threading.Lock()
        self._taken: deque[tuple[TimedPass, int, NDArray[np.int64]]] = deque()
        self.clock = Clock(len(layers), self._take)
        self.table = LatencyTable(len(layers))

    @property
    def wants_load(self) -> bool:
        """Whether the running pass is going to be taken, so that its load per expert is of use."""
        return self.clock.current is not None and len(self._taken) < PER_ROUND

    def _take(self, timed: TimedPass, whole: int, stages: NDArray[np.int64]) -> None:
        if len(self._taken) < PER_ROUND:
            self._taken.append((timed, whole, stages))

    def collect(self) -> bool:
        """Add up what is known since last time, waiting for copies from the device; whether there was anything."""
        self.clock.settle()
        with self._lock:
            rounds = len(self._taken)
            for _ in range(rounds):
                self.table.add(self._step(*self._taken.popleft()))
        return rounds > 0

    def _step(self, timed: TimedPass, whole: int, stages: NDArray[np.int64]) -> SampledStep:
        counts = None
        if sum(len(positions) for positions, _ in timed.loads) == len(self._layers):
            counts = np.zeros((len(self._layers), self._experts), dtype=np.int64)
            for positions, load in timed.loads:
                counts[positions] = load.cpu().numpy()
        return SampledStep(
            number=timed.number,
            kind=kind_of(timed.kind),
            tokens=timed.tokens,
            nanoseconds=whole,
            stages=stages if (stages >= 0).any() else None,
            counts=counts,
            flops=None if counts is None else self._flops_of(timed, counts),
        )

    def _flops_of(self, timed: TimedPass, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        work = np.full(len(counts), timed.tokens * self._experts) if timed.dense else counts.sum(axis=1)
        return np.asarray(work * self._flops, dtype=np.int64)

    def snapshot(self) -> EngineLatency | None:
        """A copy of the table as readers of a board see it."""
        with self._lock:
            arrays = {name: array.copy() for name, array in self.table.arrays.items()}
        return merge([RankLatency(self._layers, arrays)])

    def reset(self) -> None:
        self.clock.reset()
        with self._lock:
            self._taken.clear()
            self.table = LatencyTable(len(self._layers))
