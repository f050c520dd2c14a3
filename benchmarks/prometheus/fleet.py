"""A simulated fleet, as the exporter would show it: counters grow by drawn windows, the real code makes the metrics.

Used by history.py (data for the dashboards' previews) and by cost.py (series counts and query cost).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import published

from moe_monitor import baseline
from moe_monitor.catalog import IDENTITY
from moe_monitor.export import drift as drift_module
from moe_monitor.export import windows as windows_module
from moe_monitor.export.families import Family, expert_parallel, families
from moe_monitor.export.windows import History
from moe_monitor.latency import EngineLatency, LatencyTable, RankLatency, SampledStep, merge
from moe_monitor.layout import FIXED_POINT, HISTOGRAMS, RowLayout, edges
from moe_monitor.snapshot import EngineSnapshot, Status


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    experts: int
    top_k: int
    ranks: int = 1


OLMOE = Shape("allenai/OLMoE-1B-7B-0924", 16, 64, 8, 4)
LARGE = Shape("deepseek-shaped", 58, 256, 8, 8)


def probabilities(shape: Shape, text: str) -> np.ndarray:
    """[layers, experts] like the published ones: the three published layers, mixed and shuffled from layer to layer."""
    known = published.probabilities(text)
    rng = np.random.default_rng(5)  # the same shuffles for every text: experts keep their specialities
    made = []
    for layer in range(shape.layers):
        at = 2 * layer / max(shape.layers - 1, 1)
        low = min(int(at), 1)
        row = (1 - (at - low)) * known[low] + (at - low) * known[low + 1]
        row = np.concatenate([row[rng.permutation(row.size)] for _ in range(-(-shape.experts // row.size))])
        made.append(np.minimum(row[: shape.experts] * shape.top_k / row[: shape.experts].sum(), 1.0))
    return np.array(made)


@dataclass
class Traffic:
    """What one server routes at one time; arrays over layers."""

    p: np.ndarray
    tokens: int
    entropy: np.ndarray
    mass: np.ndarray


def traffic(shape: Shape, text: str, tokens: int) -> Traffic:
    depth = np.linspace(0, 1, shape.layers)
    return Traffic(probabilities(shape, text), tokens, 0.9 - 0.25 * depth, 0.3 + 0.25 * depth)


def rows(shape: Shape, now: Traffic, rng: np.random.Generator) -> np.ndarray:
    """Rows [layers, width] of one step."""
    layout = RowLayout(shape.experts)
    made = np.zeros((shape.layers, layout.width), dtype=np.int64)
    made[:, layout.offsets["experts"]] = published.draw(rng, now.p, now.tokens)
    made[:, layout.at("tokens")] = now.tokens
    passes = made[:, layout.at("passes")] = max(1, now.tokens // 32)
    active = np.minimum(shape.experts * (1 - (1 - now.p) ** 32).mean(axis=1), shape.experts)
    top1 = now.mass / 3
    values = {"entropy": now.entropy, "top1": top1, "mass": now.mass, "per_token": shape.top_k, "active": active}
    for name, (_, total) in HISTOGRAMS.items():
        mean = np.clip(np.broadcast_to(values[name], shape.layers) * rng.normal(1, 0.01, shape.layers), 0, None)
        n = passes if name == "active" else now.tokens
        bucket = layout.offsets[name].start + np.searchsorted(edges(name), mean)
        bucket = np.minimum(bucket, layout.offsets[name].stop - 1)
        made[np.arange(shape.layers), bucket] = n
        scale = FIXED_POINT if name in ("entropy", "top1", "mass") else 1
        made[:, layout.at(total)] = (mean * scale * n).astype(np.int64)
    return made


class Timed:
    """Sampled steps of one server's ranks, timed by a roofline: reading the used experts' weights, or their tiles.

    ``slow``: expert-parallel rank -> factor on its times, as a device whose clocks fell. Microseconds of an H100.
    """

    def __init__(self, shape: Shape, rng: np.random.Generator) -> None:
        self.shape, self.rng, self.number = shape, rng, 0
        self.tables = [LatencyTable(shape.layers) for _ in range(shape.ranks)]
        self.slow: dict[int, float] = {}
        self.seconds = {"decode": 0.0, "prefill": 0.0}  # of the last step of each kind

    def step(self, now: Traffic, samples: int, batch: float) -> None:
        for i in range(samples):
            prefill = i % 4 == 3
            tokens = max(1, int(self.rng.normal(1500, 300) if prefill else self.rng.lognormal(np.log(batch), 0.15)))
            self._step(now, tokens, 2 if prefill else 0)

    def _step(self, now: Traffic, tokens: int, kind: int) -> None:
        shape, per = self.shape, self.shape.experts // self.shape.ranks
        self.number += 200
        counts = self.rng.binomial(tokens, np.minimum(now.p, 1.0))
        attention = 25.0 + 0.02 * tokens
        slowest = np.zeros(shape.layers)
        made = []
        for rank, table in enumerate(self.tables):
            own = counts[:, rank * per : (rank + 1) * per]
            weights, tiles = 3.7 * (own > 0).sum(axis=1), 1.6 * (-(-own // 64)).sum(axis=1)
            experts = (9 + np.maximum(weights, tiles)) * self.slow.get(rank, 1.0)
            experts *= self.rng.normal(1, 0.02, shape.layers)
            router = np.full(shape.layers, 6.0 + 0.002 * tokens)
            slowest = np.maximum(slowest, experts)
            made.append((table, own, router, experts))
        whole = int(1000 * (slowest + router + attention).sum())
        self.seconds["prefill" if kind else "decode"] = whole / 1e9
        for table, own, router, experts in made:
            stages = np.stack([router, experts, router + experts], axis=1)
            flops = 2 * 3 * 2048 * 1024 * own.sum(axis=1)
            table.add(SampledStep(self.number, kind, tokens, whole, (1000 * stages).astype(np.int64), own, flops))

    def merged(self) -> EngineLatency | None:
        layers = tuple(range(self.shape.layers))
        ranks = self.tables
        return merge(RankLatency(layers, t.arrays, i if len(ranks) > 1 else None) for i, t in enumerate(ranks))


@dataclass
class Server:
    """One server of a shape. ``step`` routes, ``metrics`` shows what a scrape would. ``batch``: tokens of a decode
    step.
    """

    instance: str
    shape: Shape
    seed: int
    history: History = field(default_factory=lambda: History(from_start=False))
    status: Status = field(default_factory=lambda: Status(active=True, capture="retain", reason=""))
    now: float = 0.0
    age: float = 0.4
    batch: float = 24.0
    samples: int = 8

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.layout = RowLayout(self.shape.experts)
        self.rows = np.zeros((self.shape.layers, self.layout.width), dtype=np.int64)
        per = self.shape.experts // self.shape.ranks
        facts = {
            "server": self.instance,
            "producer": "vllm",
            "producer_version": "0.32.0",
            "scoring": "softmax",
            "experts": self.shape.experts,
            "top_k": self.shape.top_k,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "matrices": 3,
        }
        placed = [{"rank": r, "experts": list(range(r * per, (r + 1) * per))} for r in range(self.shape.ranks)]
        self.timed = Timed(self.shape, np.random.default_rng(self.seed + 1000))
        self.identities = [facts | ({"ep": ep} if self.shape.ranks > 1 else {}) for ep in placed]

    def step(self, now: Traffic, seconds: float) -> None:
        self.now += seconds
        self.rows = self.rows + rows(self.shape, now, self.rng)
        self.timed.step(now, self.samples, self.batch)
        passes = now.tokens // 32
        self.status.hook_seconds += passes * float(self.rng.normal(21e-6, 1e-6))

    def snapshot(self) -> EngineSnapshot:
        layers = tuple(range(self.shape.layers))
        passes = int(self.rows[0, self.layout.at("passes")])
        return EngineSnapshot(
            self.instance,
            self.shape.name,
            "0",
            layers,
            self.layout,
            self.rows,
            passes,
            self.age,
            self.status,
            self.identities,
            latency=self.timed.merged(),
        )

    def metrics(self, max_series: int | None = None) -> list[Family]:
        windows_module.time = SimpleNamespace(monotonic=lambda: self.now)  # type: ignore[assignment]
        engine = self.snapshot()
        self.history.add([engine])
        return [*families(engine, self.history, max_series), *expert_parallel([engine], self.history)]


def record_baseline(shape: Shape, text: str, path: Path, recorded: float, tokens: int = 8000) -> None:
    """Record a baseline and make the exporter's code use it."""
    rng = np.random.default_rng(99)
    windows = [rows(shape, traffic(shape, text, tokens), rng) for _ in range(10)]
    model = baseline.summarise(windows, shape.name, tuple(range(shape.layers)), shape.experts, shape.top_k, 60.0)
    baseline.write(path, [replace(model, recorded=recorded)])
    file = drift_module.BaselineFile(path)
    drift_module.configured = lambda: file  # type: ignore[assignment]


def samples(found: list[Family]) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
    """(name, labels, value) of every series."""
    for family in found:
        names = IDENTITY + family.metric.labels
        for i, own in enumerate(family.labels):
            labels = tuple(zip(names, family.identity + own, strict=True))
            if family.metric.kind != "histogram":
                yield family.metric.name, labels, float(family.values[i])
                continue
            counts = np.cumsum(np.asarray(family.values)[i])
            for bound, count in zip([*map(float, family.metric.buckets), "+Inf"], counts, strict=True):
                yield f"{family.metric.name}_bucket", (*labels, ("le", str(bound))), float(count)
            yield f"{family.metric.name}_count", labels, float(counts[-1])
            yield f"{family.metric.name}_sum", labels, float(np.asarray(family.sums)[i])
