"""The board of an API server: histograms of the traced requests that it answered.

With several API servers each answers a part of the requests. Each writes a board of its own, marked as a front end's,
and whoever renders metrics adds them up, so that every API server shows the sum.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_monitor import __version__
from moe_monitor.board import ArraySpec, BoardError, BoardWriter, live_boards
from moe_monitor.catalog import BY_NAME
from moe_monitor.export.families import Exemplar, Family, Labels

#: Histogram -> metric; those below are split by quartile of concentration.
PLAIN = {
    "entropy": "moe_request_entropy_ratio",
    "concentration": "moe_request_concentration_ratio",
    "drift": "moe_request_drift_bits",
}
BY_QUARTILE = {
    "e2e": "moe_request_e2e_seconds",
    "ttft": "moe_request_ttft_seconds",
    "tpot": "moe_request_tpot_seconds",
}
HISTOGRAMS = PLAIN | BY_QUARTILE

#: What a front end gives up to stay within bounds.
DROPPED = ("spans", "request_records")

KIND = "frontend"

#: Traced requests whose concentration quartiles are estimated from.
_RECENT = 400

Arrays = dict[str, NDArray[Any]]


def _segment() -> dict[str, ArraySpec]:
    spec: dict[str, ArraySpec] = {}
    for name, metric in HISTOGRAMS.items():
        shape = (4 if name in BY_QUARTILE else 1, len(BY_NAME[metric].buckets) + 1)
        spec |= {
            name: ("<i8", shape),
            f"{name}_sum": ("<f8", shape[:1]),
            f"{name}_trace": ("S32", shape),  # the last traced request of each bucket: its trace,
            f"{name}_seen": ("<f8", (*shape, 2)),  # its value, and when
        }
    return spec


def _empty() -> Arrays:
    return {name: np.zeros(shape, dtype) for name, (dtype, shape) in _segment().items()}


class Quartiles:
    """Quartile (0 to 3) of a value among recent ones; an estimate that gets better over the first few requests."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def place(self, value: float) -> int:
        """A value that is not known is in the first, and is not remembered."""
        if math.isnan(value):
            return 0
        if len(self._recent) == _RECENT:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(value)
        insort(self._sorted, value)
        rank = (bisect_left(self._sorted, value) + bisect_right(self._sorted, value)) / 2
        return min(3, int(4 * rank / len(self._sorted)))


class FrontBoard:
    """Histograms of one API server, on a board once there is something to show. Not thread-safe."""

    def __init__(self, directory: Path, server: str) -> None:
        self._directory = directory
        self._server = server
        self._engines: dict[tuple[str, str], Arrays] = {}
        self._quartiles: dict[tuple[str, str], Quartiles] = {}
        self._board: BoardWriter | None = None
        self._on_board: list[tuple[str, str]] = []
        self.dropped = dict.fromkeys(DROPPED, 0)

    def add(self, engine: tuple[str, str], values: dict[str, float], trace: str = "") -> None:
        """One request of an engine (model_name, engine); ``values`` by histogram, NaN where unknown."""
        if engine not in self._engines:
            self._engines[engine], self._quartiles[engine] = _empty(), Quartiles()
        arrays, place = self._engines[engine], self._quartiles[engine].place(values["concentration"])
        for name, value in values.items():
            if not math.isfinite(value):
                continue
            row = place if name in BY_QUARTILE else 0
            bucket = bisect_left(BY_NAME[HISTOGRAMS[name]].buckets, value)
            arrays[name][row, bucket] += 1
            arrays[f"{name}_sum"][row] += value
            if trace:
                arrays[f"{name}_trace"][row, bucket] = trace.encode()
                arrays[f"{name}_seen"][row, bucket] = value, time.time()

    def publish(self) -> None:
        """Raises BoardError or OSError when the board cannot be written."""
        if not self._engines and not any(self.dropped.values()):
            return
        engines = list(self._engines)
        # Somebody may have removed the file: a clean-up of temporary folders, or the end of a login.
        if self._board is None or engines != self._on_board or not self._board.in_place:
            old = self._board
            identity = {
                "kind": KIND,
                "version": __version__,
                "server": self._server,
                "engines": [list(e) for e in engines],
                "pid": os.getpid(),
                "started": time.time(),
            }
            segments: dict[str, dict[str, ArraySpec]] = {"dropped": {"n": ("<i8", (len(DROPPED),))}}
            segments |= {f"engine/{i}": _segment() for i in range(len(engines))}
            self._board = BoardWriter(self._directory, f"{self._server}.frontend.{os.getpid()}", identity, segments)
            self._on_board = engines
            if old is not None:
                old.close()  # leaves the new file, which has taken the old one's name
        for i, engine in enumerate(engines):
            self._board.write(f"engine/{i}", self._engines[engine])
        self._board.write("dropped", {"n": np.array([self.dropped[k] for k in DROPPED])})

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_front_boards(directory: Path, server: str | None) -> dict[tuple[str, str, str], tuple[Arrays, list[int]]]:
    """Histograms by (server, model_name, engine), summed over API servers; and what those dropped, on one engine each.

    What cannot be read is left out. Raises BoardError when the directory cannot be used.
    """
    found: dict[tuple[str, str, str], tuple[Arrays, list[int]]] = {}
    for reader in live_boards(directory):
        with reader, contextlib.suppress(BoardError, KeyError, ValueError, TypeError):
            facts = reader.identity
            if facts.get("kind") != KIND or server not in (None, facts.get("server")):
                continue
            dropped = [int(n) for n in reader.read("dropped").arrays["n"]]
            for i, (model, engine) in enumerate(facts["engines"]):
                key = (str(facts["server"]), str(model), str(engine))
                total, lost = found.setdefault(key, (_empty(), [0] * len(DROPPED)))
                _add(total, reader.read(f"engine/{i}").arrays)
                found[key] = (total, [a + b for a, b in zip(lost, dropped, strict=True)] if i == 0 else lost)
    return found


def _add(total: Arrays, more: Arrays) -> None:
    for name in HISTOGRAMS:
        total[name] += more[name]
        total[f"{name}_sum"] += more[f"{name}_sum"]
        newer = more[f"{name}_seen"][..., 1] > total[f"{name}_seen"][..., 1]
        total[f"{name}_trace"][newer] = more[f"{name}_trace"][newer]
        total[f"{name}_seen"][newer] = more[f"{name}_seen"][newer]


def request_families(key: tuple[str, str, str], arrays: Arrays, dropped: list[int]) -> Iterator[Family]:
    """Families of one engine's traced requests."""
    identity = key[1:]
    for name, metric in HISTOGRAMS.items():
        labels: list[Labels] = [(str(i + 1),) for i in range(4)] if name in BY_QUARTILE else [()]
        exemplars = [
            [
                Exemplar(trace.decode(), float(value), float(at)) if trace else None
                for trace, (value, at) in zip(traces, seen, strict=True)
            ]
            for traces, seen in zip(arrays[f"{name}_trace"].tolist(), arrays[f"{name}_seen"].tolist(), strict=True)
        ]
        yield Family(BY_NAME[metric], identity, labels, arrays[name], arrays[f"{name}_sum"], exemplars=exemplars)
    lost: list[tuple[str, int]] = [(what, n) for what, n in zip(DROPPED, dropped, strict=True) if n]
    yield Family(BY_NAME["moe_monitor_dropped_total"], identity, [(w,) for w, _ in lost], [n for _, n in lost])
