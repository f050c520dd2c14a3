"""Which forward passes are timed, and what the time stamps of one say: common to all clocks; and the clock of CPUs.

A clock takes the time at up to six points of every MoE layer, in sampled passes only::

    GATE_BEGIN  gate  GATE_END ... ENTER ... ROUTE_BEGIN  top-k  ROUTE_END  experts  LEAVE

router = gate + top-k; layer = the gate, where it lies before ENTER, + ENTER to LEAVE; experts = layer - router. So
dispatch, combine and shared experts count as experts.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_monitor.catalog import STAGES, STEP_KINDS
from moe_monitor.latency import LatencyTable, SampledStep

GATE_BEGIN, GATE_END, ENTER, ROUTE_BEGIN, ROUTE_END, LEAVE = range(6)
POINTS = 6

_DECODE, _PREFILL, _MIXED = range(len(STEP_KINDS))


def kind_of(scheduled: Mapping[str, int], decode_tokens: int) -> int:
    """Position in STEP_KINDS of a pass: ``scheduled`` tokens by request; a decode step gives at most ``decode_tokens``.

    The last few tokens of a prompt, in a chunk as small as a decode step, pass for one.
    """
    long = sum(n > decode_tokens for n in scheduled.values())
    return _DECODE if long == 0 else _PREFILL if long == len(scheduled) else _MIXED


def stages_of(points: NDArray[np.int64], overhead: int) -> NDArray[np.int64]:
    """Stamps int64 [layers, POINTS] -> durations int64 [layers, len(STAGES)], both in ns.

    0 is no stamp; a stage that lacks one is -1. ``overhead``: what a stamp itself adds to the time between two.
    """
    p = points.astype(np.int64)
    inside = p[:, LEAVE] - p[:, ENTER]
    route = p[:, ROUTE_END] - p[:, ROUTE_BEGIN] - overhead
    whole = (p[:, [ENTER, ROUTE_BEGIN, ROUTE_END, LEAVE]] > 0).all(axis=1)
    gated = (p[:, [GATE_BEGIN, GATE_END]] > 0).all(axis=1)
    within = gated & (p[:, GATE_BEGIN] >= p[:, ENTER])  # the layer holds its own gate
    gate = np.where(gated, p[:, GATE_END] - p[:, GATE_BEGIN] - overhead, 0)
    inside -= overhead * np.where(within, 5, 3)
    layer = inside + np.where(within, 0, gate)
    experts = layer - gate - route
    result = np.stack([gate + route, experts, layer], axis=1)
    ordered = whole & (inside >= 0) & (route >= 0) & (gate >= 0) & (experts >= 0)
    result[~ordered] = -1
    result[~gated, STAGES.index("router")] = result[~gated, STAGES.index("layer")] = -1
    return result


class Sampler:
    """Which passes are timed: one in ``every`` on average, at distances that vary, so that no rhythm is followed.

    The same numbers on every rank.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._state = 1
        #: No pass with a smaller number is timed.
        self.next = every

    def hit(self, number: int) -> bool:
        """Whether the pass with this number is timed, in which case it is not asked about again; numbers must grow."""
        if number < self.next:
            return False
        self._state = (self._state * 1_103_515_245 + 12_345) % (1 << 31)
        self.next = number + self._every // 2 + self._state % (self._every + 1)
        return True


@dataclass(frozen=True)
class Work:
    """What the expert GEMMs of a rank cost: FLOPs of one token on one expert, and the experts that lie here.

    experts None: all of them. known False: this rank's experts also work for tokens that it does not count.
    """

    flops: int
    experts: Sequence[int] | None = None
    known: bool = True

    def local(self, rows_before: NDArray[np.int64], rows_after: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
        """Tokens per [layer, local expert] of the pass between two readings of the counter rows."""
        counts = (rows_after - rows_before)[:, :experts]
        return counts if self.experts is None else counts[:, list(self.experts)]


class HostClock:
    """For CPUs: the monotonic clock of the host, resolution and error below a microsecond.

    One thread runs passes; ``collect`` may run on another.
    """

    #: What the clock is, for ``moe-monitor doctor`` and the docs.
    name = "host"

    def __init__(self, layers: int, every: int, work: Work, experts: int) -> None:
        self.table = LatencyTable(layers)
        self.sampling = False
        self.dropped = 0
        self._sampler = Sampler(every)
        self._work = work
        self._experts = experts
        self._points = np.zeros((layers, POINTS), dtype=np.int64)
        self._done: deque[SampledStep] = deque()
        self._lock = threading.Lock()
        self._number = self._tokens = self._kind = self._begin = self._took = self._left_out = 0
        self._before: NDArray[np.int64] | None = None

    @property
    def soonest(self) -> int:
        """Unless a pass is being timed, :meth:`begin` has nothing to do before the one with this number."""
        return self._sampler.next

    def begin(self, number: int, tokens: int, kind: Callable[[], int], rows: NDArray[np.int64] | None) -> None:
        """A real pass is about to run; ``rows`` are the counter rows as they stand."""
        self.sampling = self._sampler.hit(number)
        if not self.sampling:
            return
        self._points[:], self._left_out = 0, 0
        self._number, self._tokens, self._kind, self._before = number, tokens, kind(), rows
        self._begin = time.perf_counter_ns()

    def point(self, layer: int, point: int) -> None:
        """Take the time, in a sampled pass."""
        if self.sampling:
            self._points[layer, point] = time.perf_counter_ns() - self._left_out

    def has(self, layer: int, point: int) -> bool:
        """Whether the time was taken there in this pass."""
        return bool(self._points[layer, point])

    def leave_out(self, nanoseconds: int) -> None:
        """So much of this pass was the monitor's own work."""
        self._left_out += nanoseconds

    def stop(self) -> None:
        """The pass has run."""
        self._took = time.perf_counter_ns() - self._begin - self._left_out

    def end(self, rows: NDArray[np.int64] | None) -> None:
        """The pass has run and was counted; ``rows`` include it."""
        if not self.sampling:
            return
        self.sampling = False
        counts = None
        if self._work.known and rows is not None and self._before is not None:
            counts = self._work.local(self._before, rows, self._experts)
        flops = None if counts is None else self._work.flops * counts.sum(axis=1)
        step = SampledStep(
            self._number, self._kind, self._tokens, self._took, stages_of(self._points, 0), counts, flops
        )
        with self._lock:
            self._done.append(step)

    def cancel(self) -> None:
        """The pass in progress is none that counts."""
        self.sampling = False

    def collect(self) -> bool:
        """Move finished steps into the table; whether there were any."""
        with self._lock:
            steps = list(self._done)
            self._done.clear()
        for step in steps:
            self.table.add(step)
        return bool(steps)
