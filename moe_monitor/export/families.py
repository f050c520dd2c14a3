"""From snapshots to metric families: the numbers of the catalogue, ready to be written in any format.

A :class:`Family` holds label values and numbers side by side, so that label text can be made once and kept while
only the numbers change from scrape to scrape.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moe_monitor import __version__, statistics
from moe_monitor.catalog import BY_NAME, IDENTITY, WINDOWS, Metric
from moe_monitor.export.drift import drift
from moe_monitor.export.drift import ranks as baseline_ranks
from moe_monitor.export.latency import latency
from moe_monitor.export.windows import History
from moe_monitor.layout import FIXED_POINT, HISTOGRAMS
from moe_monitor.snapshot import EngineSnapshot

#: A board older than this is no longer live: several publishing intervals, whatever the interval is set to.
STALE_SECONDS = 15.0

#: Experts shown at each end of a layer when the matrix is too large to be shown whole.
EXTREMES = 4

_SUMS_IN_FIXED_POINT = {"entropy", "top1", "mass"}

Labels = tuple[str, ...]


class Exemplar(NamedTuple):
    """A traced request that fell into a bucket: its trace id, its value, and when, in seconds since the epoch."""

    trace: str
    value: float
    at: float


@dataclass(frozen=True)
class Family:
    """One metric of one engine.

    ``labels``: values of the metric's own labels, one tuple per series; ``values``: one number per series.
    Histograms: ``values`` is [series, buckets+1] of non-cumulative counts and ``sums`` one number per series;
    ``exemplars``, if any, has one or None per bucket.
    """

    metric: Metric
    identity: Labels
    labels: list[Labels]
    values: Any
    sums: Any = None
    server: str = ""
    exemplars: list[list[Exemplar | None]] | None = None

    @property
    def names(self) -> Labels:
        """Label names of every series; ``server`` tells apart those that one exporter shows side by side."""
        return (("server",) if self.server else ()) + IDENTITY + self.metric.labels

    @property
    def common(self) -> Labels:
        """Values of the labels that all series of the family share."""
        return ((self.server,) if self.server else ()) + self.identity


def live(engine: EngineSnapshot) -> bool:
    """Whether the engine's numbers are captured and fresh."""
    return engine.status.active and engine.age < STALE_SECONDS


def families(engine: EngineSnapshot, history: History, max_series: int | None) -> Iterator[Family]:
    """All families of one engine. ``max_series`` bounds the layer-by-expert matrix; None shows it whole."""
    identity = (engine.model_name, engine.engine)

    def family(name: str, labels: list[Labels], values: Any, sums: Any = None) -> Family:
        return Family(BY_NAME[name], identity, labels, values, sums)

    yield from _about_itself(engine, family)
    yield from latency(engine, family, max_series)
    if engine.layout is None or not engine.layers:
        return
    layers: list[Labels] = [(str(i),) for i in engine.layers]
    yield family("moe_routed_tokens_total", layers, engine.column("tokens"))
    yield family("moe_nonfinite_tokens_total", layers, engine.column("nonfinite"))
    yield family("moe_forward_passes_total", [()], [engine.passes])
    yield family("moe_flops_total", *_flops(engine))
    yield family("moe_expert_tokens_total", *_matrix(engine, max_series))
    for name, (metric, total) in HISTOGRAMS.items():
        scale = FIXED_POINT if name in _SUMS_IN_FIXED_POINT else 1
        yield family(metric, layers, engine.column(name), engine.column(total) / scale)
    yield family("moe_model_experts", [()], [engine.layout.experts])
    yield family("moe_model_top_k", [()], [engine.top_k])
    yield from _balance(engine, history, family)
    yield from drift(engine, history, family)


def expert_parallel(engines: list[EngineSnapshot], history: History) -> Iterator[Family]:
    """Load by expert-parallel rank, of engines that serve one model together: each knows only its own experts."""
    owner: dict[int, list[int]] = {}
    for engine in engines:
        owner |= engine.placement
    ranks = sorted(owner)
    shared = [e for e in engines if e.layout is not None and e.layers == engines[0].layers]
    if len(ranks) < 2 or not shared:
        return
    for engine in shared:
        per_rank = _by_rank(engine.counts, owner, ranks)
        labels: list[Labels] = [(str(layer), str(rank)) for layer in engine.layers for rank in ranks]
        identity = (engine.model_name, engine.engine)
        yield Family(BY_NAME["moe_ep_rank_tokens_total"], identity, labels, per_rank.ravel())
    gauge: list[tuple[Labels, float]] = []
    for name, seconds in WINDOWS.items():
        total = sum(_by_rank(_window_counts(e, history, seconds), owner, ranks) for e in shared)
        values = zip(shared[0].layers, statistics.imbalance(total).tolist(), strict=True)
        gauge += [((str(layer), name), value) for layer, value in values if value == value]
    for engine in shared:
        identity = (engine.model_name, engine.engine)
        yield Family(BY_NAME["moe_ep_rank_imbalance_ratio"], identity, [g[0] for g in gauge], [g[1] for g in gauge])
        normal = baseline_ranks(engine, [owner[rank] for rank in ranks])
        if normal is not None:
            layers: list[Labels] = [(str(layer),) for layer in engine.layers]
            yield Family(BY_NAME["moe_baseline_ep_rank_imbalance_ratio"], identity, layers, normal[0])
            yield Family(BY_NAME["moe_ep_rank_imbalance_limit_ratio"], identity, layers, normal[1])


def _by_rank(counts: Any, owner: dict[int, list[int]], ranks: list[int]) -> Any:
    """[layers, experts] -> [layers, ranks]"""
    return np.stack([counts[:, owner[rank]].sum(axis=1) for rank in ranks], axis=1)


def _window_counts(engine: EngineSnapshot, history: History, seconds: float) -> Any:
    assert engine.layout is not None
    return engine.layout.column(history.window(engine, seconds), "experts")


def _about_itself(engine: EngineSnapshot, family: Any) -> Iterator[Family]:
    facts = engine.identity
    info = (
        __version__,
        f"{facts.get('producer', '')} {facts.get('producer_version', '')}".strip(),
        engine.status.capture,
        str(facts.get("scoring", "")),
        str(facts.get("experts", 0)),
        str(engine.top_k),
        str(len(engine.layers)),
    )
    yield family("moe_monitor_info", [info], [1])
    yield family("moe_monitor_active", [()], [int(live(engine))])
    yield family("moe_monitor_sampled_requests_total", [()], [engine.status.sampled])
    errors, dropped = engine.status.errors, engine.status.dropped
    yield family("moe_monitor_errors_total", [(k,) for k in errors], list(errors.values()))
    yield family("moe_monitor_dropped_total", [(k,) for k in dropped], list(dropped.values()))
    yield family("moe_monitor_snapshot_age_seconds", [()], [round(engine.age, 3)])
    yield family("moe_monitor_hook_seconds_total", [()], [engine.status.hook_seconds])


def _flops(engine: EngineSnapshot) -> tuple[list[Labels], list[int]]:
    """Gate: 2*hidden*experts a token. Expert: 2*matrices*hidden*intermediate a routed token (SwiGLU: 3 matrices).

    Where a model lets every expert compute every token (``dense_experts``), all of them are done, chosen or not.
    """
    facts = engine.identity
    hidden, inner = int(facts.get("hidden_size", 0)), int(facts.get("intermediate_size", 0))
    everywhere = int(facts.get("experts", 0)) * int(engine.column("tokens").sum())
    gate = 2 * hidden * everywhere
    work = everywhere if facts.get("dense_experts") else int(engine.counts.sum())
    experts = 2 * int(facts.get("matrices", 3)) * hidden * inner * work
    return [("router",), ("experts",)], [gate, experts]


@functools.lru_cache(maxsize=32)
def _whole(layers: tuple[int, ...], experts: int) -> list[Labels]:
    """Kept, because making 14,848 of them at every scrape takes as long as writing their numbers. Do not change it."""
    return [(str(layer), str(expert)) for layer in layers for expert in range(experts)]


def _matrix(engine: EngineSnapshot, max_series: int | None) -> tuple[list[Labels], Any]:
    counts = engine.counts
    if max_series is None or counts.size <= max_series:
        return _whole(engine.layers, counts.shape[1]), counts.ravel()
    order = np.argsort(counts, axis=1, kind="stable")
    shown = np.sort(np.concatenate([order[:, :EXTREMES], order[:, -EXTREMES:]], axis=1), axis=1)
    labels: list[Labels] = [
        (str(layer), str(expert)) for layer, row in zip(engine.layers, shown.tolist(), strict=True) for expert in row
    ]
    return labels, np.take_along_axis(counts, shown, axis=1).ravel()


def _balance(engine: EngineSnapshot, history: History, family: Any) -> Iterator[Family]:
    assert engine.layout is not None
    labels: list[Labels] = []
    columns: dict[str, list[Any]] = {}
    for name, seconds in WINDOWS.items():
        rows = history.window(engine, seconds)
        counts = engine.layout.column(rows, "experts")
        tokens = engine.layout.column(rows, "tokens")
        labels += [(str(layer), name) for layer in engine.layers]
        floor = [statistics.imbalance_floor(int(n), engine.layout.experts, engine.top_k) for n in tokens]
        gauges: dict[str, Any] = {
            "moe_load_imbalance_ratio": statistics.imbalance(counts),
            "moe_load_imbalance_floor_ratio": floor,
            "moe_load_cv_ratio": statistics.cv(counts),
            "moe_load_gini_ratio": statistics.gini(counts),
            "moe_load_entropy_ratio": statistics.entropy_ratio(counts),
            "moe_idle_experts": np.where(tokens > 0, statistics.idle(counts), np.nan),
            "moe_window_tokens": tokens,
        }
        for metric, values in gauges.items():
            columns.setdefault(metric, []).extend(values)
    for metric, values in columns.items():
        known = [i for i, v in enumerate(values) if v == v]  # a window without tokens has no balance: no series
        yield family(metric, [labels[i] for i in known], [values[i] for i in known])
