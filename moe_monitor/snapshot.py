"""What readers see: the boards of one run directory merged into one snapshot per engine.

An engine is one data-parallel replica as vLLM numbers them. Its ranks write a board each: pipeline stages bring
different layers, ranks that see different tokens of a layer add up, and ranks that would repeat another's counts
publish none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_monitor.board import ArraySpec, BoardError, BoardReader, live_boards
from moe_monitor.latency import SEGMENT as LATENCY
from moe_monitor.latency import EngineLatency, RankLatency, merge
from moe_monitor.layout import RowLayout

STATUS_BYTES = 8192

#: How a status is cut that does not fit, from hardly to always enough (a character takes up to 12 bytes of JSON):
#: characters of the reason, characters of a name, number of names.
_CUTS = ((2000, 200, 100), (200, 60, 30), (0, 16, 12))

#: Segment tables shared by every writer.
STATUS_SEGMENT: dict[str, ArraySpec] = {"json": ("u1", (STATUS_BYTES,))}


def routing_segment(layers: int, width: int) -> dict[str, ArraySpec]:
    return {"rows": ("<i8", (layers, width)), "passes": ("<i8", (1,))}


@dataclass
class Status:
    """How a writer is doing; travels as JSON in the ``status`` segment."""

    active: bool = False
    reason: str = "starting"
    capture: str = "none"
    errors: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    hook_seconds: float = 0.0
    sampled: int = 0

    def to_array(self) -> NDArray[np.uint8]:
        """NUL-padded UTF-8; what would not fit is cut, the counts add up all the same."""
        text = b""
        for reason, length, names in _CUTS:
            cut = {
                "reason": self.reason[:reason],
                "capture": self.capture[:length],
                "errors": _fewer(self.errors, length, names),
                "dropped": _fewer(self.dropped, length, names),
            }
            text = json.dumps({**self.__dict__, **cut}).encode()
            if len(text) <= STATUS_BYTES:
                break
        return np.frombuffer(text.ljust(STATUS_BYTES, b"\0"), dtype=np.uint8)

    @classmethod
    def from_array(cls, array: NDArray[np.uint8]) -> Status:
        """Raises ValueError for anything :meth:`to_array` would not have written."""
        text = array.tobytes().rstrip(b"\0")
        if not text:  # a board that was made a moment ago
            return cls()
        try:
            data = json.loads(text)
            status = cls(
                active=bool(data["active"]),
                reason=str(data["reason"]),
                capture=str(data["capture"]),
                errors={str(k): _count(v) for k, v in data["errors"].items()},
                dropped={str(k): _count(v) for k, v in data["dropped"].items()},
                hook_seconds=float(data["hook_seconds"]),
                sampled=_count(data.get("sampled", 0)),
            )
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError("the status is damaged") from error
        if not 0 <= status.hook_seconds < math.inf:
            raise ValueError("the status is damaged")
        return status


def _fewer(counts: dict[str, int], length: int, most: int) -> dict[str, int]:
    """Names cut to ``length``, at most ``most`` of them; what has no name of its own left is counted as "others"."""
    kept: dict[str, int] = {}
    for name, n in list(counts.items()):  # a copy: other threads count meanwhile
        short = name[:length]
        if short not in kept and len(kept) >= most:
            short = "others"
        kept[short] = min(kept.get(short, 0) + n, (1 << 63) - 1)
    return kept


def _count(value: Any, limit: int = 1 << 63) -> int:
    number = int(value)
    if not 0 <= number < limit:
        raise ValueError(value)
    return number


@dataclass
class EngineSnapshot:
    """One engine at one moment. ``rows`` is int64 [layers, layout.width]; ``layers`` are layer indices, sorted."""

    server: str
    model_name: str
    engine: str
    layers: tuple[int, ...]
    layout: RowLayout | None
    rows: NDArray[np.int64]
    passes: int
    age: float
    status: Status
    identities: list[dict[str, Any]]
    #: Durations of sampled steps, None where nothing is timed.
    latency: EngineLatency | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.server, self.model_name, self.engine)

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the first rank; model facts are the same on all."""
        return self.identities[0]

    @property
    def top_k(self) -> int:
        return int(self.identity.get("top_k", 0))

    @property
    def placement(self) -> dict[int, list[int]]:
        """Expert-parallel rank -> logical experts on it, as far as this engine's ranks tell."""
        found = [i["ep"] for i in self.identities if isinstance(i.get("ep"), dict)]
        return {int(e["rank"]): [int(x) for x in e["experts"]] for e in found}

    def column(self, name: str) -> NDArray[np.int64]:
        """A column of the rows for all layers, see :class:`RowLayout`. Raises ValueError without MoE layers."""
        if self.layout is None:
            raise ValueError("this engine has no MoE layers")
        return self.layout.column(self.rows, name)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Tokens per [layer, expert]."""
        return self.column("experts")


@dataclass
class _Rank:
    identity: dict[str, Any]
    status: Status
    age: float
    rows: NDArray[np.int64] | None
    passes: int
    latency: RankLatency | None = None


def _read_rank(reader: BoardReader) -> _Rank:
    identity = reader.identity
    record = reader.read("status")
    try:
        status = Status.from_array(record.arrays["json"])
        layers, experts = [_count(i, 1 << 31) for i in identity["layers"]], int(identity["experts"])
        for name in ("top_k", "hidden_size", "intermediate_size", "matrices"):
            _count(identity.get(name, 0), 1 << 31)
        str(identity["server"]), str(identity["model_name"]), str(identity["engine"])
        latency = None
        if LATENCY in reader.segments:
            ep = identity.get("ep")
            ep_rank = _count(ep["rank"], 1 << 31) if isinstance(ep, dict) else None
            latency = RankLatency(tuple(layers), reader.read(LATENCY).arrays, ep_rank)
        if "routing" not in reader.segments:
            return _Rank(identity, status, record.age, None, 0, latency)
        arrays = reader.read("routing").arrays
        rows = arrays["rows"]
        if rows.dtype != np.int64 or rows.shape != (len(layers), RowLayout(experts).width):
            raise ValueError(rows.shape)
        return _Rank(identity, status, record.age, rows, int(arrays["passes"][0]), latency)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise BoardError(f"{str(reader.path)!r} is not a usable board: its content is damaged") from error


def _merge(ranks: list[_Rank]) -> EngineSnapshot:
    first = ranks[0].identity
    worst = min(ranks, key=lambda r: r.status.active).status
    status = Status(active=worst.active, reason=worst.reason, capture=worst.capture)
    for rank in ranks:
        for name, n in rank.status.errors.items():
            status.errors[name] = status.errors.get(name, 0) + n
        for name, n in rank.status.dropped.items():
            status.dropped[name] = status.dropped.get(name, 0) + n
        status.hook_seconds += rank.status.hook_seconds
        status.sampled = max(status.sampled, rank.status.sampled)  # all ranks trace the same requests
    counting = [r for r in ranks if r.rows is not None]
    layout = RowLayout(int(counting[0].identity["experts"])) if counting else None
    by_layer: dict[int, NDArray[np.int64]] = {}
    for rank in counting:
        assert rank.rows is not None and layout is not None
        if rank.rows.shape[1] != layout.width:
            raise BoardError("ranks of one engine disagree about the number of experts")
        for layer, row in zip(rank.identity["layers"], rank.rows, strict=True):
            by_layer[int(layer)] = by_layer[int(layer)] + row if int(layer) in by_layer else row
    layers = tuple(sorted(by_layer))
    return EngineSnapshot(
        server=str(first["server"]),
        model_name=str(first["model_name"]),
        engine=str(first["engine"]),
        layers=layers,
        layout=layout,
        rows=np.stack([by_layer[i] for i in layers]) if layers else np.zeros((0, 0), dtype=np.int64),
        passes=max((r.passes for r in counting), default=0),
        age=max(r.age for r in ranks),
        status=status,
        identities=[r.identity for r in ranks],
        latency=merge(r.latency for r in ranks if r.latency is not None),
    )


def read_engines(
    directory: Path, server: str | None = None, on_error: Any = None, pause: Callable[[], None] = lambda: None
) -> list[EngineSnapshot]:
    """Snapshots of all live engines in a run directory, of one server or of all, in a stable order.

    A board that cannot be read is left out and, if given, ``on_error(BoardError)`` is told. ``pause`` is called after
    each board.
    Raises BoardError when the directory itself cannot be used.
    """
    groups: dict[tuple[str, str, str], list[_Rank]] = {}
    for reader in live_boards(directory):
        pause()
        with reader:
            if server is not None and reader.identity.get("server") != server:
                continue
            if reader.identity.get("kind", "worker") != "worker":
                continue  # an API server's own
            try:
                rank = _read_rank(reader)
            except BoardError as error:
                if on_error is not None:
                    on_error(error)
                continue
        key = tuple(str(rank.identity[k]) for k in ("server", "model_name", "engine"))
        groups.setdefault(key, []).append(rank)  # type: ignore[arg-type]
    return list(_merged(groups.values(), on_error))


def _merged(groups: Iterable[list[_Rank]], on_error: Any) -> Iterable[EngineSnapshot]:
    for ranks in groups:
        try:
            yield _merge(ranks)
        except BoardError as error:
            if on_error is not None:
                on_error(error)
