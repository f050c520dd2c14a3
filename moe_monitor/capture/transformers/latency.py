"""How long passes and their MoE layers take: perf_counter on CPUs, CUDA events on GPUs (read without waiting).

Every pass that Python runs is timed, with all its layers; nothing can be timed from outside in compiled code.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_monitor.catalog import STAGES

#: Durations kept per layer and stage; older ones are overwritten.
KEPT = 4096

#: Passes whose CUDA events may be in flight before new ones are dropped.
MAX_PENDING = 256


@dataclass(slots=True)
class TimedPass:
    """One pass, with its ends and the ends of its stages as :meth:`Clock.mark` gives them.

    stages: (position in STAGES, position of the layer, start, end). kind: position in STEP_KINDS, or the cumulative
    lengths of the requests, on the device, which tell it. tokens: rows that the model computed, padding included.
    loads: for some layers (positions) tokens per [layer, expert], padding included, on their device.
    dense: every expert computed every token.
    """

    number: int
    begin: Any
    end: Any = None
    kind: int | Tensor = 0
    tokens: int = 0
    stages: list[tuple[int, int, Any, Any]] = field(default_factory=list)
    loads: list[tuple[list[int], Tensor]] = field(default_factory=list)
    dense: bool = False


def _nanoseconds(start: Any, end: Any) -> int:
    return round(1e9 * (end - start)) if isinstance(start, float) else round(1e6 * start.elapsed_time(end))


class Clock:
    """Durations of every layer and stage, in seconds. Passes are timed by one thread; any may settle and read.

    ``sink`` is given every pass as soon as its times are known: nanoseconds of the pass, and of [layers, stages]
    (int64, -1 where a stage was not timed).
    """

    def __init__(self, layers: int, sink: Callable[[TimedPass, int, NDArray[np.int64]], None]) -> None:
        self._layers, self._sink = layers, sink
        self._lock = threading.Lock()
        self._pending: deque[TimedPass] = deque()
        self._free: dict[torch.device, list[Any]] = {}
        self._streams: dict[torch.device, Any] = {}
        self._capturing = False
        self._passes = 0
        #: The pass that is running.
        self.current: TimedPass | None = None
        #: Passes that were not timed because too many were in flight.
        self.dropped = 0
        self._clear()

    def _clear(self) -> None:
        shape = (self._layers, len(STAGES))
        self._ring: NDArray[np.float64] = np.full((*shape, KEPT), np.nan)
        self._count: NDArray[np.int64] = np.zeros(shape, dtype=np.int64)
        self._sum: NDArray[np.int64] = np.zeros(shape, dtype=np.int64)

    # while a pass runs

    # Not recursive: that takes no wrapper, whose time at each of a hundred marks would be more than the mark's own.
    @torch.compiler.disable(recursive=False)
    def mark(self, device: torch.device) -> Any:
        """The present moment: seconds, or a recorded CUDA event; None while a CUDA graph is captured."""
        if device.type != "cuda":
            return time.perf_counter()
        if self._capturing:
            return None
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.current_stream(device)
        free = self._free.get(device)
        event = free.pop() if free else torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def marker(self, device: torch.device) -> Callable[[], Any]:
        """:meth:`mark` for one device; on a CPU nothing but the clock itself, because it is asked six times a layer."""
        return time.perf_counter if device.type != "cuda" else partial(self.mark, device)

    def begin(self, device: torch.device) -> None:
        """A pass begins; it is taken to stay on the streams that are current now."""
        self._passes += 1
        self._streams.clear()
        self._capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        self.current = TimedPass(self._passes, self.mark(device))

    def end(self, device: torch.device, kind: int | Tensor, tokens: int) -> None:
        """The model has run; what is done to the pass from now on is not timed."""
        if self.current is not None:
            self.current.end, self.current.kind, self.current.tokens = self.mark(device), kind, tokens

    def finish(self, *, good: bool) -> None:
        """The pass is over; its times count if it was good."""
        done, self.current = self.current, None
        if not good or done is None or done.begin is None or done.end is None:
            return
        if len(self._pending) >= MAX_PENDING:
            self.dropped += 1
            return
        self._pending.append(done)
        self.settle()

    # afterwards

    def settle(self, *, wait: bool = False) -> None:
        """Read the passes whose CUDA events have passed; ``wait`` for all."""
        if not self._lock.acquire(blocking=wait):
            return  # another thread is at it
        try:
            while self._pending:
                ends = self._ends(self._pending[0])
                for end in ends:
                    if wait:
                        end.synchronize()
                    elif not end.query():
                        return
                self._read(self._pending.popleft())
        finally:
            self._lock.release()

    def _ends(self, timed: TimedPass) -> list[Any]:
        """The last CUDA event of a pass on each device."""
        events = {}
        for mark in (*(end for _, _, _, end in timed.stages), timed.end):
            if not isinstance(mark, float):
                events[mark.device] = mark
        return list(events.values())

    def _read(self, timed: TimedPass) -> None:
        taken: NDArray[np.int64] = np.full((self._layers, len(STAGES)), -1, dtype=np.int64)
        marks = {id(timed.begin): timed.begin, id(timed.end): timed.end}
        if timed.stages and all(type(end) is float for *_, end in timed.stages):
            stage, layer, start, end = np.array(timed.stages).T
            taken[layer.astype(int), stage.astype(int)] = np.rint(1e9 * (end - start))
        else:
            for stage, layer, start, end in timed.stages:
                taken[layer, stage] = _nanoseconds(start, end)
                marks[id(start)], marks[id(end)] = start, end
        whole = _nanoseconds(timed.begin, timed.end)
        known = taken >= 0
        self._ring[(*np.nonzero(known), self._count[known] % KEPT)] = taken[known] / 1e9
        self._count += known
        self._sum += np.where(known, taken, 0)
        for mark in marks.values():
            if not isinstance(mark, float):
                self._free.setdefault(mark.device, []).append(mark)
        timed.stages.clear()
        self._sink(timed, whole, taken)

    def durations(self) -> dict[str, list[NDArray[np.float64]]]:
        """stage -> one array of the last durations (seconds, at most KEPT) per layer."""
        self.settle(wait=True)
        return {
            name: [self._ring[i, s, : min(int(self._count[i, s]), KEPT)].copy() for i in range(self._layers)]
            for s, name in enumerate(STAGES)
        }

    def totals(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """stage -> (how many durations, their sum in seconds), per layer, since the start."""
        self.settle(wait=True)
        return {name: (self._count[:, s].copy(), self._sum[:, s] / 1e9) for s, name in enumerate(STAGES)}

    def reset(self) -> None:
        with self._lock:
            self._pending.clear()
            self._clear()
