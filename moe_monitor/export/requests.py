"""What the routing of one traced request says: the numbers behind its span, request metrics and the terminal."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_monitor import statistics
from moe_monitor.export.windows import History
from moe_monitor.layout import FIXED_POINT, NO_ENTROPY, TALLY_COLUMNS
from moe_monitor.records import PATIENCE, RecordReader, RequestRecord, lowest_entropy
from moe_monitor.snapshot import EngineSnapshot

#: Counts of this many (layer, phase, expert) are worked on at a time.
_AT_ONCE = 1 << 17

#: Experts named per layer, and the window of the fleet's load that drift is measured against, in seconds.
TOP_EXPERTS, FLEET_WINDOW = 4, 300.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """One traced request. Arrays have a value per layer, in the order of ``record.layers``; NaN: no token to say.
    ``counts`` [layers, experts] are of both phases, ``fleet`` is the engine's recent load of that form, if it is known.

    What only a span or a page tells is calculated when it is asked for: most requests are not looked at one by one.
    """

    record: RequestRecord
    fleet: NDArray[np.int64] | None
    prefill: int
    decode: int
    seen: Floats
    entropy: Floats
    imbalance: Floats
    chance: Floats
    counts: NDArray[np.int64]

    def _mean(self, column: str) -> Floats:
        return np.asarray(self.record.column(column) / FIXED_POINT / self.seen)

    @cached_property
    def top1(self) -> Floats:
        return self._mean("top1_sum")

    @cached_property
    def mass(self) -> Floats:
        return self._mean("mass_sum")

    @cached_property
    def entropy_min(self) -> Floats:
        lowest = lowest_entropy(self.record)
        return np.where(lowest < NO_ENTROPY, lowest / FIXED_POINT, np.nan)

    @cached_property
    def drift(self) -> Floats:
        if self.fleet is None:
            return np.full(len(self.seen), np.nan)
        return statistics.js_divergence(self.counts, self.fleet)

    @cached_property
    def drift_floor(self) -> Floats:
        if self.fleet is None:
            return np.full(len(self.seen), np.nan)
        per_token = np.full(len(self.seen), self.top_k)
        return statistics.js_floor(self.counts.sum(axis=-1), self.fleet, per_token)

    @property
    def top_k(self) -> int:
        return _top_k(self.record)

    @property
    def experts(self) -> int:
        return int(self.record.counts.shape[-1])

    @property
    def concentration(self) -> float:
        """Busiest expert's load over what chance gives for as many tokens, mean over layers."""
        return mean(self.imbalance / self.chance)

    def top_experts(self, layer: int) -> list[tuple[int, float]]:
        """(expert, share of the layer's choices) of the most used experts; ``layer`` is a position."""
        load = self.record.counts[layer].sum(axis=0)
        order = np.argsort(-load, kind="stable")[:TOP_EXPERTS]
        total = int(load.sum())
        return [(int(e), float(load[e] / total)) for e in order if load[e]]


def mean(values: Floats) -> float:
    """Mean of what is known; NaN when nothing is."""
    return _means(values[np.newaxis])[0]


def least(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.min()) if len(known) else math.nan


def most(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.max()) if len(known) else math.nan


class _Columns(NamedTuple):
    """Of several requests over the same layers: see :class:`Summary`, [requests, layers]; counts have one axis more."""

    seen: Floats
    entropy: Floats
    imbalance: Floats
    chance: Floats
    counts: NDArray[np.int64]


def _columns(counts: NDArray[np.int64], stats: NDArray[np.int64], top_k: int) -> _Columns:
    """``counts`` [requests, layers, 2, experts], ``stats`` [requests, layers, columns]."""
    both = counts.sum(axis=2)
    of = {name: stats[..., i] for i, name in enumerate(TALLY_COLUMNS)}
    tokens = of["prefill"] + of["decode"]
    seen = (tokens - of["nonfinite"]).astype(np.float64)
    seen[seen <= 0] = np.nan
    told = tokens.ravel().tolist()  # mostly the same in all layers
    chance = {n: statistics.imbalance_floor(n, both.shape[-1], top_k) for n in set(told)}
    return _Columns(
        seen=seen,
        entropy=of["entropy_sum"] / FIXED_POINT / seen,
        imbalance=statistics.imbalance(both),
        chance=np.array([chance[n] for n in told]).reshape(tokens.shape),
        counts=both,
    )


def summarise(record: RequestRecord, fleet: NDArray[np.int64] | None = None) -> Summary:
    """``fleet``: recent load [layers, experts] of the request's engine. Raises ValueError for damaged records."""
    columns = _Columns(*(a[0] for a in _columns(record.counts[None], record.stats[None], _top_k(record))))
    return Summary(
        record=record,
        fleet=fleet if fleet is not None and fleet.shape == columns.counts.shape else None,
        prefill=int(record.column("prefill").max(initial=0)),
        decode=int(record.column("decode").max(initial=0)),
        **columns._asdict(),
    )


class Overview(NamedTuple):
    """What the metrics tell of a request: means over its layers, NaN where nothing is known."""

    entropy: float
    concentration: float
    drift: float


def overviews(
    records: Sequence[RequestRecord],
    fleet: Callable[[RequestRecord], NDArray[np.int64] | None],
    pause: Callable[[], None] = lambda: None,
) -> list[Overview]:
    """Of many requests at a time, each as its :class:`Summary` has it: one by one most of the time would go to finding
    numpy's way. ``pause`` is called now and then. Raises ValueError for damaged records.
    """
    found: dict[int, Overview] = {}
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, record in enumerate(records):
        form = record.layers, record.counts.shape, record.stats.shape, _top_k(record)
        alike.setdefault((record.server, record.model_name, record.engine, *form), []).append(i)
    for of in alike.values():
        first = records[of[0]]
        load = fleet(first)
        step = max(1, _AT_ONCE // max(1, first.counts.size))
        for at in range(0, len(of), step):
            pause()
            some = of[at : at + step]
            counts = np.stack([records[i].counts for i in some])
            columns = _columns(counts, np.stack([records[i].stats for i in some]), _top_k(first))
            if load is not None and load.shape == columns.counts.shape[1:]:
                drift = _means(statistics.js_divergence(columns.counts, load))
            else:
                drift = [math.nan] * len(some)
            concentration = _means(columns.imbalance / columns.chance)
            for i, *means in zip(some, _means(columns.entropy), concentration, drift, strict=True):
                found[i] = Overview(*means)
    return [found[i] for i in range(len(records))]


def _means(values: Floats) -> list[float]:
    """:func:`mean` of each row."""
    known = ~np.isnan(values)
    n = known.sum(axis=-1)
    total = np.where(known, values, 0.0).sum(axis=-1)
    means: list[float] = np.where(n > 0, total / np.maximum(n, 1), math.nan).tolist()
    return means


def _top_k(record: RequestRecord) -> int:
    return int(record.identity["top_k"])


class Collects(Protocol):
    """The part of a collector that knows the engines' recent load."""

    @property
    def history(self) -> History: ...

    def read(self) -> list[EngineSnapshot]: ...


class FleetLoad:
    """Recent load of each engine, read again at most every ten seconds. Thread-safe; never raises.

    Every second while an engine has made fewer than FEW choices of experts: shares of little load are chance.
    """

    REFRESH, SOON, FEW = 10.0, 1.0, 1 << 20

    def __init__(self, collector: Collects) -> None:
        self._collector = collector
        self._lock = threading.Lock()
        self._read = -math.inf
        self._loads: dict[tuple[str, str, str], tuple[tuple[int, ...], NDArray[np.int64]]] = {}

    def of(self, record: RequestRecord) -> NDArray[np.int64] | None:
        """The load [layers, experts] of the request's engine, None when it is not known."""
        key = (record.server, record.model_name, record.engine)
        with self._lock:
            age = time.monotonic() - self._read
            known = self._loads.get(key)
            # An engine that has only begun to route is looked at again at once.
            routed = 0 if known is None else int(known[1].sum())
            if age >= (0.1 if not routed else self.SOON if routed < self.FEW else self.REFRESH):
                self._refresh()
            layers, load = self._loads.get(key, ((), None))
        return load if layers == record.layers else None

    def _refresh(self) -> None:
        self._read = time.monotonic()
        self._loads = {}
        for engine in self._collector.read():
            if engine.layout is not None:
                rows = self._collector.history.window(engine, FLEET_WINDOW)
                self._loads[engine.key] = (engine.layers, engine.layout.column(rows, "experts"))


def recent(directory: Path, fleet: FleetLoad, limit: int = 1000, server: str | None = None) -> list[Summary]:
    """The last traced requests of all servers of a run directory, or of one, newest first; damaged records are left
    out.
    """
    # A few more than wanted: the boards of a request's ranks need not be equally far.
    reader = RecordReader(directory, server, patience=0, newest=limit + 16)
    try:
        records = reader.poll()
    finally:
        reader.close()
    found = []
    for record in records[::-1][:limit]:
        if not record.whole and time.time() - record.meta.finished < PATIENCE:
            continue  # the other ranks' parts are still to come
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found.append(summarise(record, fleet.of(record)))
    return found


def as_json(summary: Summary) -> dict[str, Any]:
    """The request as ``GET /requests`` tells it; numbers that are not known are null."""

    def known(value: float) -> float | None:
        return None if math.isnan(value) else round(float(value), 6)

    record = summary.record
    tokens = record.column("prefill") + record.column("decode")
    layers = [
        {
            "layer": layer,
            "tokens": int(tokens[i]),
            "entropy": known(summary.entropy[i]),
            "entropy_min": known(summary.entropy_min[i]),
            "top1": known(summary.top1[i]),
            "selected_mass": known(summary.mass[i]),
            "imbalance": known(summary.imbalance[i]),
            "imbalance_by_chance": known(summary.chance[i]),
            "drift_bits": known(summary.drift[i]),
            "drift_floor_bits": known(summary.drift_floor[i]),
            "experts": [{"expert": e, "share": round(share, 6)} for e, share in summary.top_experts(i)],
        }
        for i, layer in enumerate(record.layers)
    ]
    return {
        "id": record.meta.id,
        "server": record.server,
        "model_name": record.model_name,
        "engine": record.engine,
        "started": record.meta.started,
        "finished": record.meta.finished,
        "prompt_tokens": record.meta.prompt_tokens,
        "cached_tokens": record.meta.cached_tokens,
        "preemptions": record.meta.preemptions,
        "prefill_tokens": summary.prefill,
        "decode_tokens": summary.decode,
        "experts": summary.experts,
        "top_k": summary.top_k,
        "entropy": known(mean(summary.entropy)),
        "entropy_min": known(least(summary.entropy_min)),
        "top1": known(mean(summary.top1)),
        "selected_mass": known(mean(summary.mass)),
        "concentration": known(summary.concentration),
        "drift_bits": known(mean(summary.drift)),
        "drift_floor_bits": known(mean(summary.drift_floor)),
        "layers": layers,
    }
