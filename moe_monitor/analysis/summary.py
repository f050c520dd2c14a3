"""Everything per layer in one table: load and its balance, router confidence, experts per token, FLOPs, latency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_monitor import statistics
from moe_monitor.analysis import tables
from moe_monitor.analysis.records import Record
from moe_monitor.layout import FIXED_POINT, HISTOGRAMS, edges
from moe_monitor.snapshot import EngineSnapshot

#: Quantiles given for every distribution: column suffix -> probability.
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}

#: Distributions of the summary -> histogram of the counter rows.
DISTRIBUTIONS = {
    "router_entropy_ratio": "entropy",
    "top1_probability": "top1",
    "selected_mass_ratio": "mass",
    "experts_per_token": "per_token",
    "active_experts": "active",
}

Durations = Mapping[str, Sequence[NDArray[np.float64]]]
Totals = Mapping[str, tuple[NDArray[np.int64], NDArray[np.float64]]]


def describe(values: Any) -> dict[str, float]:
    """mean, std (population), p50, p95 and p99 (linear interpolation) of a sample; NaN where it is empty."""
    sample = np.asarray(values, dtype=np.float64).ravel()
    if sample.size == 0:
        return dict.fromkeys(("mean", "std", *QUANTILES), math.nan)
    found = np.quantile(sample, list(QUANTILES.values()))
    return {
        "mean": float(sample.mean()),
        "std": float(sample.std()),
        **{k: float(v) for k, v in zip(QUANTILES, found, strict=True)},
    }


def histogram_quantile(counts: NDArray[np.int64], bounds: Sequence[float], q: float) -> float:
    """Quantile from bucket counts [buckets+1], linear inside the bucket as PromQL's histogram_quantile; NaN if empty.

    The first bucket begins at 0; what lies in the last, open bucket is taken to be at the highest bound.
    """
    total = int(counts.sum())
    if total == 0:
        return math.nan
    cumulative = np.cumsum(counts)
    at = int(np.searchsorted(cumulative, q * total, side="left"))
    at = min(at, len(counts) - 1)
    if at >= len(bounds):
        return float(bounds[-1])
    low = float(bounds[at - 1]) if at else 0.0
    before = int(cumulative[at - 1]) if at else 0
    inside = int(counts[at])
    return low if inside == 0 else low + (float(bounds[at]) - low) * (q * total - before) / inside


@dataclass(frozen=True)
class Summary:
    """The numbers of one run. ``rows``: one dictionary per layer, the same keys in each; None where not known.

    Units stand in the names: ``_seconds``, ``_ratio``, ``_probability``; ``flops_*`` are floating-point operations
    (a multiply-add is 2), counts are tokens, passes or experts. ``counts``: tokens per [layer, expert].
    ``entropy``: tokens per [layer, bucket] of router entropy, the buckets of the metric without the open last one.
    ``total``: the same over all layers. ``facts``: model and versions. ``exact_quantiles``: quantiles come from
    recorded tokens, not from histogram buckets (linear inside a bucket).
    """

    facts: dict[str, Any]
    layers: tuple[int, ...]
    counts: NDArray[np.int64]
    entropy: NDArray[np.int64]
    rows: list[dict[str, Any]]
    total: dict[str, Any]
    exact_quantiles: bool
    record: Record | None = field(default=None, repr=False)

    def experts(self) -> list[dict[str, Any]]:
        """One dictionary per layer and expert: layer, expert, tokens, share of the layer's load, load over the mean."""
        load = self.counts.sum(axis=1)
        mean = self.counts.mean(axis=1)
        return [
            {
                "layer": layer,
                "expert": expert,
                "tokens": int(n),
                "share_ratio": float(n / load[i]) if load[i] else None,
                "load_over_mean_ratio": float(n / mean[i]) if load[i] else None,
            }
            for i, layer in enumerate(self.layers)
            for expert, n in enumerate(self.counts[i].tolist())
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dictionaries; what is not known is None."""
        return {
            "facts": self.facts,
            "exact_quantiles": self.exact_quantiles,
            "total": self.total,
            "layers": self.rows,
            "experts": self.counts.tolist(),
            "router_entropy_buckets": {"upper": list(edges("entropy")), "tokens": self.entropy.tolist()},
        }

    def to_frame(self) -> Any:
        """The per-layer table as a pandas DataFrame. Raises ImportError without pandas."""
        return tables.frame(self.rows)

    def to_csv(self, path: str | PathLike[str], table: str = "layers") -> None:
        """Write a CSV; ``table`` is "layers" or "experts". Raises OSError, ValueError."""
        tables.write_csv(path, self._table(table))

    def to_parquet(self, path: str | PathLike[str], table: str = "layers") -> None:
        """Write a Parquet file; ``table`` as in :meth:`to_csv`. Raises ImportError without pyarrow."""
        tables.write_parquet(path, self._table(table), self.facts)

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write :meth:`to_dict` as JSON (no NaN)."""
        tables.write_json(path, self.to_dict())

    def to_html(self, path: str | PathLike[str], **options: Any) -> None:
        """Write the report, see :func:`moe_monitor.analysis.report.render`."""
        from moe_monitor.analysis.report import render

        with open(path, "w", encoding="utf-8") as file:
            file.write(render(self, **options))

    def print(self) -> None:
        """The most useful columns as a table on standard output."""
        tables.print_summary(self)

    def _table(self, name: str) -> list[dict[str, Any]]:
        if name == "layers":
            return self.rows
        if name == "experts":
            return self.experts()
        raise ValueError(f"there is no table {name!r}; there are 'layers' and 'experts'")


def _balance(counts: NDArray[np.int64], tokens: int, top_k: int) -> dict[str, Any]:
    experts = int(counts.shape[-1])
    return {
        "load_imbalance_ratio": float(statistics.imbalance(counts)),
        "load_imbalance_floor_ratio": statistics.imbalance_floor(tokens, experts, top_k),
        "load_cv_ratio": float(statistics.cv(counts)),
        "load_gini_ratio": float(statistics.gini(counts)),
        "load_entropy_ratio": float(statistics.entropy_ratio(counts)),
        "idle_experts": int(statistics.idle(counts)) if tokens else None,
    }


def _recorded(record: Record, layer: int, name: str) -> NDArray[np.float64]:
    """One layer's recorded values of a distribution."""
    chosen = record.chosen()[layer]
    if name == "experts_per_token":
        return np.asarray(chosen.sum(axis=1), dtype=np.float64)
    if name == "active_experts":
        ends = np.cumsum(record.passes)[:-1]
        return np.array([part.any(axis=0).sum() for part in np.split(chosen, ends)], dtype=np.float64)
    p = record.probabilities[layer].astype(np.float64)
    finite = np.isfinite(p).all(axis=1)
    p, chosen = p[finite], chosen[finite]
    if name == "top1_probability":
        return np.asarray(p.max(axis=1), dtype=np.float64)
    if name == "selected_mass_ratio":
        return np.asarray((p * chosen).sum(axis=1), dtype=np.float64)
    terms = p * np.log(np.where(p > 0, p, 1.0))
    scale = math.log(p.shape[1]) if p.shape[1] > 1 else 1.0
    return np.asarray(-terms.sum(axis=1) / scale, dtype=np.float64)


def _distributions(engine: EngineSnapshot, at: int, record: Record | None) -> dict[str, float | None]:
    result: dict[str, float | None] = {}
    for name, histogram in DISTRIBUTIONS.items():
        if record is not None:
            found: dict[str, float | None] = dict(describe(_recorded(record, at, name)))
        else:
            counts = engine.column(histogram)[at]
            number = int(counts.sum())
            scale = FIXED_POINT if histogram in {"entropy", "top1", "mass"} else 1
            total = int(engine.column(HISTOGRAMS[histogram][1])[at]) / scale
            found = {"mean": total / number if number else None, "std": None}
            found |= {k: histogram_quantile(counts, edges(histogram), q) for k, q in QUANTILES.items()}
        result |= {f"{name}_{key}": value for key, value in found.items()}
    return result


def _known(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def summarise(
    engine: EngineSnapshot,
    *,
    durations: Durations | None = None,
    totals: Totals | None = None,
    record: Record | None = None,
) -> Summary:
    """The summary of a snapshot, whoever captured it (transformers or vLLM, live or read from a board).

    durations: stage -> seconds per call, one array per layer. totals: stage -> (calls, seconds) per layer.
    record: recorded tokens of the same run, for exact quantiles and standard deviations.
    Raises ValueError for an engine without MoE layers.
    """
    counts = engine.counts
    facts = engine.identity
    tokens = engine.column("tokens")
    hidden, inner = int(facts.get("hidden_size", 0)), int(facts.get("intermediate_size", 0))
    matrices = int(facts.get("matrices", 3))
    rows = []
    for at, layer in enumerate(engine.layers):
        n = int(tokens[at])
        router = 2 * hidden * counts.shape[1] * n
        expert_tokens = n * counts.shape[1] if facts.get("dense_experts") else int(counts[at].sum())
        experts = 2 * matrices * hidden * inner * expert_tokens
        row: dict[str, Any] = {
            "layer": layer,
            "tokens": n,
            "passes": int(engine.column("passes")[at]),
            "flops_router": router,
            "flops_experts": experts,
            "flops_total": router + experts,
            **_balance(counts[at], n, engine.top_k),
            **_distributions(engine, at, record),
            "nonfinite_tokens": int(engine.column("nonfinite")[at]),
        }
        for stage, samples in (durations or {}).items():
            row |= {f"{stage}_seconds_{key}": value for key, value in describe(samples[at]).items()}
        for stage, (calls, seconds) in (totals or {}).items():
            row |= {f"{stage}_seconds_count": int(calls[at]), f"{stage}_seconds_sum": float(seconds[at])}
        rows.append(_known(row))
    return Summary(
        facts={
            **{k: facts.get(k) for k in ("model_name", "producer", "producer_version", "version", "scoring")},
            **{k: facts.get(k) for k in ("experts", "top_k", "hidden_size", "intermediate_size", "matrices")},
            "layers": len(engine.layers),
        },
        layers=engine.layers,
        counts=counts,
        entropy=engine.column("entropy")[:, : len(edges("entropy"))],
        rows=rows,
        total=_known(_total(engine, rows)),
        exact_quantiles=record is not None,
        record=record,
    )


def _total(engine: EngineSnapshot, rows: list[dict[str, Any]]) -> dict[str, Any]:
    finite = int((engine.column("tokens") - engine.column("nonfinite")).sum())
    total: dict[str, Any] = {
        "tokens": int(engine.column("tokens").max(initial=0)),
        "passes": engine.passes,
        **{k: sum(r[k] for r in rows) for k in ("flops_router", "flops_experts", "flops_total")},
        "router_entropy_ratio_mean": engine.column("entropy_sum").sum() / FIXED_POINT / finite if finite else None,
        "top1_probability_mean": engine.column("top1_sum").sum() / FIXED_POINT / finite if finite else None,
        "idle_experts": sum(r["idle_experts"] or 0 for r in rows),
    }
    known = [r for r in rows if r["load_imbalance_ratio"] is not None]
    if known:
        worst = max(known, key=lambda r: r["load_imbalance_ratio"])
        total["load_imbalance_ratio_max"] = worst["load_imbalance_ratio"]
        total["load_imbalance_floor_ratio"] = worst["load_imbalance_floor_ratio"]
        total["most_imbalanced_layer"] = worst["layer"]
    seconds = [r["layer_seconds_sum"] for r in rows if "layer_seconds_sum" in r]
    if seconds:
        total["layer_seconds_sum"] = sum(seconds)
    return {k: float(v) if isinstance(v, np.floating) else v for k, v in total.items()}
