"""Records of traced requests on the board: how a worker hands them over, and how readers pick them up.

A board with tracing has a ring of N segments ``request/i`` and an index. Record number s (from 1) lies in segment
``s % N``; the writer never waits for a reader, so a reader that comes too late finds it overwritten, and counts that.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_monitor.board import ArraySpec, BoardError, BoardReader, BoardWriter, Ring, board_paths
from moe_monitor.gil import Turns
from moe_monitor.layout import NO_ENTROPY, TALLY_COLUMNS

META_BYTES = 2048
INDEX, RING = "requests", "request"

#: All records of a board stay within this many bytes, but are at least and at most so many.
_BUDGET, _LEAST, _MOST = 8 << 20, 16, 256
_LONGEST_ID = 200
_ENTROPY_MIN = TALLY_COLUMNS.index("entropy_min")

#: How long a record waits for those of other ranks, in seconds: they gather by clocks of their own.
PATIENCE = 3.5

#: Bytes of records that are read with one look at the file.
_READ_AT_ONCE = 1 << 20

#: Seconds in which a directory may change twice and its time of change only once, generously.
_CLOCK_TICK = 1.0


def short_id(request_id: str) -> str:
    """A request id as it travels: ids that clients made very long are cut, and told apart by a hash."""
    if len(request_id) <= _LONGEST_ID:
        return request_id
    digest = blake2b(request_id.encode("utf-8", "replace"), digest_size=16).hexdigest()
    return f"{request_id[: _LONGEST_ID - len(digest) - 1]}-{digest}"


@dataclass(frozen=True)
class Meta:
    """What is known of a traced request besides its tallies. Times in seconds since the epoch."""

    id: str
    prompt_tokens: int
    cached_tokens: int
    preemptions: int
    started: float
    finished: float
    serial: int = 0

    def to_array(self, serial: int) -> NDArray[np.uint8]:
        text = json.dumps({**self.__dict__, "serial": serial}, ensure_ascii=False).encode("utf-8", "replace")
        return np.frombuffer(text.ljust(META_BYTES, b"\0"), dtype=np.uint8)

    @classmethod
    def from_array(cls, array: NDArray[np.uint8]) -> Meta:
        """Raises ValueError, KeyError or TypeError for anything :meth:`to_array` would not have written."""
        data = json.loads(array.tobytes().rstrip(b"\0"))
        whole = {k: int(data[k]) for k in ("prompt_tokens", "cached_tokens", "preemptions", "serial")}
        return cls(id=str(data["id"]), started=float(data["started"]), finished=float(data["finished"]), **whole)


@dataclass(frozen=True)
class Tally:
    """A finished request on one rank: ``counts`` int32 [layers, 2, experts], ``stats`` int64 [layers, 8]."""

    meta: Meta
    counts: NDArray[np.int32]
    stats: NDArray[np.int64]


def record_segments(layers: int, experts: int) -> dict[str, dict[str, ArraySpec] | Ring]:
    """The segments of a board that carries records."""
    size = META_BYTES + layers * (2 * experts * 4 + len(TALLY_COLUMNS) * 8)
    record: dict[str, ArraySpec] = {
        "meta": ("u1", (META_BYTES,)),
        "counts": ("<i4", (layers, 2, experts)),
        "stats": ("<i8", (layers, len(TALLY_COLUMNS))),
    }
    n = max(_LEAST, min(_MOST, _BUDGET // size))
    index: dict[str, ArraySpec] = {"serial": ("<i8", (1,)), "n": ("<i8", (1,))}
    return {INDEX: index, RING: Ring(n, record)}


class RecordWriter:
    """Writes records to a board made with :func:`record_segments`."""

    def __init__(self, board: BoardWriter, segments: Mapping[str, Any]) -> None:
        self.board = board
        self._n = segments[RING].copies if RING in segments else 0
        self._serial = 0
        self._pause = Turns()

    @property
    def at_once(self) -> int:
        """Records of one round: few enough that readers who are two rounds late still see all."""
        return self._n // 3

    def write(self, tallies: Iterable[Tally]) -> None:
        """Raises OSError, ValueError as the board does. Readers see them when all are there."""
        before = self._serial
        for tally in tallies:
            self._serial += 1
            meta = tally.meta.to_array(self._serial)
            arrays: dict[str, NDArray[Any]] = {"meta": meta, "counts": tally.counts, "stats": tally.stats}
            self.board.write(f"{RING}/{self._serial % self._n}", arrays)
            self._pause()
        if self._serial > before:
            self.board.write(INDEX, {"serial": np.array([self._serial]), "n": np.array([self._n])})


@dataclass
class RequestRecord:
    """A traced request of one engine, all ranks together. ``layers`` are layer indices, sorted."""

    server: str
    model_name: str
    engine: str
    meta: Meta
    layers: tuple[int, ...]
    counts: NDArray[np.int64]
    stats: NDArray[np.int64]
    identity: dict[str, Any]
    #: Whether all of the engine's ranks that have a board gave their part.
    whole: bool = True

    def column(self, name: str) -> NDArray[np.int64]:
        """A column of :data:`~moe_monitor.layout.TALLY_COLUMNS` for all layers."""
        return np.asarray(self.stats[:, TALLY_COLUMNS.index(name)])


@dataclass
class _Parts:
    since: float
    by_board: dict[str, tuple[dict[str, Any], Tally]] = field(default_factory=dict)


@dataclass
class _Followed:
    reader: BoardReader
    stamp: tuple[int, int]
    engine: tuple[str, str, str]
    serial: int = -1


def _engine_of(identity: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(identity.get("server")), str(identity.get("model_name")), str(identity.get("engine"))


def _merge(parts: Sequence[tuple[dict[str, Any], Tally]]) -> RequestRecord:
    if len(parts) == 1:
        identity, tally = parts[0]
        layers = tuple(identity["layers"])
        if all(a < b for a, b in itertools.pairwise(layers)) and len(layers) == len(tally.stats):
            return _record(identity, tally.meta, layers, tally.counts.astype(np.int64), tally.stats.copy())
    counts: dict[int, NDArray[np.int64]] = {}
    stats: dict[int, NDArray[np.int64]] = {}
    for identity, tally in parts:
        for layer, more, row in zip(identity["layers"], tally.counts.astype(np.int64), tally.stats, strict=True):
            if layer not in counts:
                counts[layer], stats[layer] = more, row.copy()
                continue
            counts[layer] = counts[layer] + more
            least = min(stats[layer][_ENTROPY_MIN], row[_ENTROPY_MIN])
            stats[layer] = stats[layer] + row
            stats[layer][_ENTROPY_MIN] = least
    layers = tuple(sorted(counts))
    meta = max((tally.meta for _, tally in parts), key=lambda m: m.finished)
    return _record(
        parts[0][0], meta, layers, np.stack([counts[i] for i in layers]), np.stack([stats[i] for i in layers])
    )


def _record(
    facts: dict[str, Any], meta: Meta, layers: tuple[int, ...], counts: NDArray[np.int64], stats: NDArray[np.int64]
) -> RequestRecord:
    return RequestRecord(
        server=str(facts["server"]),
        model_name=str(facts["model_name"]),
        engine=str(facts["engine"]),
        meta=meta,
        layers=layers,
        counts=counts,
        stats=stats,
        identity=facts,
    )


class RecordReader:
    """Follows the boards of a run directory and returns what has newly finished. Not thread-safe.

    server: only this server's boards; None for all. patience: seconds to wait for the other ranks of an engine once
    one has handed a request over. newest: how many of those that a board has already are of interest; None for all.
    pause: called before each read and after each record. ``missed`` counts records that were overwritten before they
    were read.
    """

    def __init__(
        self,
        directory: Path,
        server: str | None = None,
        patience: float = PATIENCE,
        *,
        newest: int | None = None,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory = directory
        self._server = server
        self._patience = patience
        self._newest = newest
        self._pause = pause
        self._boards: dict[str, _Followed] = {}
        self._ignored: dict[str, tuple[int, int]] = {}
        #: When the directory had last changed as its boards were looked for; NaN: they must be looked for again.
        self._listed = math.nan
        self._parts: dict[tuple[str, str, str, str], _Parts] = {}
        self.missed = 0

    def poll(self, now: float | None = None) -> list[RequestRecord]:
        """New records, oldest first. What cannot be read is left out, a missing directory has no records."""
        now = time.monotonic() if now is None else now
        self._look_for_boards()
        for name, followed in list(self._boards.items()):
            with contextlib.suppress(BoardError):
                self._read(name, followed, now)
        return self._complete(now)

    def _look_for_boards(self) -> None:
        looked = time.time()
        try:
            changed = os.stat(self._directory).st_mtime
            if changed == self._listed:
                return
            # Not for good if it may change once more without its time telling.
            paths, self._listed = board_paths(self._directory), changed if looked - changed > _CLOCK_TICK else math.nan
        except (BoardError, OSError):
            paths, self._listed = [], math.nan
        here = {path.name for path in paths}
        for gone in set(self._boards) - here:
            self._boards.pop(gone).reader.close()
        self._ignored = {name: stamp for name, stamp in self._ignored.items() if name in here}
        for path in paths:
            try:
                info = path.stat()
            except OSError:
                continue
            stamp = (info.st_dev, info.st_ino)
            known = self._boards.get(path.name)
            if self._ignored.get(path.name) == stamp or (known is not None and known.stamp == stamp):
                continue
            if known is not None:
                self._boards.pop(path.name).reader.close()
            try:
                reader = BoardReader(path)
            except BoardError:
                self._ignored[path.name] = stamp
                continue
            wanted = self._server in (None, reader.identity.get("server"))
            if not wanted or INDEX not in reader.segments or not reader.alive:
                reader.close()
                self._ignored[path.name] = stamp
                continue
            self._boards[path.name] = _Followed(reader, stamp, _engine_of(reader.identity))

    def waiting(self) -> float:
        """The share of the ring that the records which :meth:`poll` would find take up, of the board that has most."""
        most = 0.0
        for name, followed in self._boards.items():
            with contextlib.suppress(BoardError):
                last, n = self._index(name, followed)
                most = max(most, (last - max(0, followed.serial)) / n)
        return most

    def _index(self, name: str, followed: _Followed) -> tuple[int, int]:
        """The number of the last record, and how many are kept."""
        index = followed.reader.read(INDEX).arrays
        last, n = int(index["serial"][0]), int(index["n"][0])
        if not 0 < n == followed.reader.copies(RING):
            raise BoardError(f"{name!r} is not a usable board: its index is damaged")
        return last, n

    def _read(self, name: str, followed: _Followed, now: float) -> None:
        last, n = self._index(name, followed)
        if followed.serial < 0:
            followed.serial = 0 if self._newest is None else max(0, last - self._newest)
        first = max(followed.serial + 1, last - n + 1)
        self.missed += first - followed.serial - 1
        followed.serial = first - 1
        step = max(1, _READ_AT_ONCE // followed.reader.bytes_of(RING))
        while followed.serial < last:
            self._pause()
            begin = followed.serial + 1
            many = min(step, last - begin + 1, n - begin % n)  # up to the ring's end
            found = followed.reader.read_ring(RING, begin % n, many)
            for serial, arrays in enumerate(found, begin):
                followed.serial = serial
                self._keep(name, followed, serial, arrays, now)
                self._pause()

    def _keep(
        self, name: str, followed: _Followed, serial: int, arrays: dict[str, NDArray[Any]] | None, now: float
    ) -> None:
        try:
            meta = None if arrays is None else Meta.from_array(arrays["meta"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            meta = None
        if arrays is None or meta is None or meta.serial != serial:
            self.missed += 1
            return
        parts = self._parts.setdefault((*followed.engine, meta.id), _Parts(now))
        parts.by_board[name] = (followed.reader.identity, Tally(meta, arrays["counts"], arrays["stats"]))

    def _complete(self, now: float) -> list[RequestRecord]:
        found = []
        for key, parts in list(self._parts.items()):
            engine = [name for name, followed in self._boards.items() if followed.engine == key[:3]]
            whole = set(engine) <= set(parts.by_board)
            if whole or now - parts.since >= self._patience:
                del self._parts[key]
                self._pause()
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = _merge(list(parts.by_board.values()))
                    record.whole = whole
                    found.append(record)
        return sorted(found, key=lambda record: record.meta.finished)

    def close(self) -> None:
        for followed in self._boards.values():
            followed.reader.close()
        self._boards.clear()


def lowest_entropy(record: RequestRecord) -> NDArray[np.int64]:
    """``entropy_min`` per layer in fixed point, :data:`~moe_monitor.layout.NO_ENTROPY` where there was none."""
    return np.minimum(record.column("entropy_min"), NO_ENTROPY)
