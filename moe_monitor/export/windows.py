"""Trailing windows over counters: what was routed in the last minute, the last five.

Counters only ever grow, so a window is a difference of two snapshots. The history keeps one snapshot per step of
:data:`RESOLUTION` seconds; a window therefore reaches back its length plus at most that.
"""

from __future__ import annotations

import threading
import time
from collections import deque

import numpy as np
from numpy.typing import NDArray

from moe_monitor.catalog import WINDOWS
from moe_monitor.snapshot import EngineSnapshot

RESOLUTION = 5.0

_Key = tuple[str, str, str]
_Entry = tuple[float, NDArray[np.int64]]


class History:
    """Recent rows of every engine. Thread-safe; the lock covers list handling only.

    ``from_start``: the history is as old as the engines, so what it first sees was all routed since they started.
    Otherwise nothing is known of the time before.
    """

    def __init__(self, *, from_start: bool) -> None:
        self._from_start = from_start
        self._lock = threading.Lock()
        self._entries: dict[_Key, deque[_Entry]] = {}
        self._ranks: dict[_Key, list[str]] = {}

    def add(self, engines: list[EngineSnapshot], now: float | None = None) -> None:
        """Remember these snapshots (at most one per RESOLUTION) and forget engines that are gone."""
        now = time.monotonic() if now is None else now
        keep = max(WINDOWS.values()) + RESOLUTION
        with self._lock:
            for gone in set(self._entries) - {e.key for e in engines}:
                del self._entries[gone], self._ranks[gone]
            for engine in engines:
                entries = self._entries.setdefault(engine.key, deque())
                ranks = [f"{i.get('rank')} {i.get('started')}" for i in engine.identities]
                if not entries:
                    entries.append((now, np.zeros_like(engine.rows) if self._from_start else engine.rows))
                elif self._ranks[engine.key] != ranks or not _grown(entries[-1][1], engine.rows):
                    # A rank ended, came or started anew: what it had counted is no load of this window.
                    entries.clear()
                    entries.append((now, engine.rows))
                self._ranks[engine.key] = ranks
                if now - entries[-1][0] >= RESOLUTION:
                    entries.append((now, engine.rows))
                while len(entries) > 2 and entries[1][0] <= now - keep:
                    entries.popleft()

    def window(self, engine: EngineSnapshot, seconds: float, now: float | None = None) -> NDArray[np.int64]:
        """Rows accumulated in the trailing window; since first seen while that is more recent than the window."""
        now = time.monotonic() if now is None else now
        with self._lock:
            entries = list(self._entries.get(engine.key, ()))
        past = [rows for at, rows in entries[1:] if at <= now - seconds]
        base = past[-1] if past else entries[0][1] if entries else engine.rows
        return engine.rows - base if _grown(base, engine.rows) else np.zeros_like(engine.rows)


def _grown(before: NDArray[np.int64], after: NDArray[np.int64]) -> bool:
    return before.shape == after.shape and bool((after >= before).all())
