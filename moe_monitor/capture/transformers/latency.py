"""How long each MoE layer takes, by stage: perf_counter on CPUs, CUDA events on GPUs (read without waiting)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

#: router: logits and choice. experts: the chosen experts. layer: the whole MoE block, shared experts included.
STAGES = ("router", "experts", "layer")

#: Durations kept per layer and stage; older ones are overwritten.
KEPT = 4096

#: Pairs of CUDA events in flight before new ones are dropped.
MAX_PENDING = 20_000


class Clock:
    """Durations of every layer and stage, in seconds. Not for several threads at a time."""

    def __init__(self, layers: int) -> None:
        self._ring: NDArray[np.float64] = np.full((len(STAGES), layers, KEPT), np.nan)
        self._count: NDArray[np.int64] = np.zeros((len(STAGES), layers), dtype=np.int64)
        self._sum: NDArray[np.float64] = np.zeros((len(STAGES), layers))
        self._pending: list[tuple[int, int, Any, Any]] = []
        self._free: list[Any] = []
        self.dropped = 0

    def _event(self, device: torch.device) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    @torch.compiler.disable
    def mark(self, device: torch.device) -> Any:
        """The present moment: seconds, or a recorded CUDA event; None while a CUDA graph is captured."""
        if device.type != "cuda":
            return time.perf_counter()
        return None if torch.cuda.is_current_stream_capturing() else self._event(device)

    @torch.compiler.disable
    def add(self, stage: int, layer: int, start: Any, end: Any) -> None:
        """Take the time between two marks; ``layer`` is a position, ``stage`` one in STAGES."""
        if start is None or end is None:
            return
        if isinstance(start, float):
            self._put(stage, layer, end - start)
        elif len(self._pending) < MAX_PENDING:
            self._pending.append((stage, layer, start, end))
        else:
            self.dropped += 1

    def _put(self, stage: int, layer: int, seconds: float) -> None:
        n = int(self._count[stage, layer])
        self._ring[stage, layer, n % KEPT] = seconds
        self._count[stage, layer] = n + 1
        self._sum[stage, layer] += seconds

    @torch.compiler.disable
    def settle(self, *, wait: bool = False) -> None:
        """Read the CUDA events that have passed; ``wait`` for all of them."""
        if wait and self._pending:
            self._pending[-1][3].synchronize()
        later = []
        for entry in self._pending:
            stage, layer, start, end = entry
            if not end.query():
                later.append(entry)
                continue
            self._put(stage, layer, start.elapsed_time(end) / 1e3)
        self._pending = later

    def durations(self) -> dict[str, list[NDArray[np.float64]]]:
        """stage -> one array of the last durations (seconds, at most KEPT) per layer."""
        self.settle(wait=True)
        return {
            name: [ring[: min(int(n), KEPT)].copy() for ring, n in zip(self._ring[s], self._count[s], strict=True)]
            for s, name in enumerate(STAGES)
        }

    def totals(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """stage -> (how many durations, their sum in seconds), per layer, since the start."""
        self.settle(wait=True)
        return {name: (self._count[s].copy(), self._sum[s].copy()) for s, name in enumerate(STAGES)}

    def reset(self) -> None:
        self._pending.clear()
        self._ring[:], self._count[:], self._sum[:] = np.nan, 0, 0.0
