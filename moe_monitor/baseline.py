"""A deployment's normal routing: recorded from live boards, kept in a file, compared with what is routed now.

What is normal differs from deployment to deployment: real text of one domain puts three to seven times the mean load
on the busiest expert. So the baseline holds the distribution of each layer together with its own variability, seen
over the windows of the recording, and the limits that alerts compare with are made from those.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_monitor import statistics
from moe_monitor.layout import FIXED_POINT, RowLayout

FORMAT = "moe-monitor-baseline"
VERSION = 1

#: Fewer windows than this tell nothing about variability.
MIN_WINDOWS = 3

_MAX_BYTES = 64 << 20

Floats = NDArray[np.float64]


class BaselineError(Exception):
    """A baseline cannot be made, read or used; the message is one plain sentence."""


@dataclass(frozen=True)
class LayerStatistics:
    """Arrays over the layers of a model.

    counts: [layers, experts] tokens; the rest [layers]. ``tokens``: tokens that passed the router; ``window_tokens``:
    median of a window. ``entropy``, ``mass``: means over tokens (entropy over ln(experts)), with the standard
    deviation of the windows' means. ``imbalance``, ``cv``: largest of any window. ``drift``: mean divergence of a
    window from all others, bits; ``drift_excess``: the largest, less what sampling alone explains.
    """

    counts: Floats
    tokens: Floats
    window_tokens: Floats
    entropy: Floats
    entropy_deviation: Floats
    mass: Floats
    mass_deviation: Floats
    imbalance: Floats
    cv: Floats
    drift: Floats
    drift_excess: Floats


_COLUMNS = tuple(f.name for f in fields(LayerStatistics))


@dataclass(frozen=True)
class Model:
    """The normal routing of one model. ``recorded``: seconds since the epoch."""

    model_name: str
    experts: int
    top_k: int
    layers: tuple[int, ...]
    recorded: float
    windows: int
    window_seconds: float
    statistics: LayerStatistics

    @cached_property
    def worst_imbalance(self) -> float:
        """The busiest expert cannot have more than every token: experts / top_k times the mean load."""
        return self.experts / self.top_k

    def drift(self, counts: Any) -> Floats:
        """Divergence in bits of each layer's counts [layers, experts] from the baseline."""
        return statistics.js_divergence(counts, self.statistics.counts)

    def drift_floor(self, assignments: Any) -> Floats:
        """Drift in bits that sampling alone explains for as many expert choices, [layers]."""
        s = self.statistics
        with np.errstate(divide="ignore", invalid="ignore"):
            per_token = np.where(s.tokens > 0, s.counts.sum(axis=-1) / s.tokens, self.top_k)
        return statistics.js_floor(assignments, s.counts, per_token)

    def drift_limit(self, assignments: Any) -> Floats:
        """Highest normal drift, bits [layers]: twice what the deployment's own windows and sampling explain.

        Tokens of one request are alike, so windows differ by more than sampling explains. That part is taken to grow
        as sampling does when a window has fewer tokens than the recorded ones had. Below 0.01 bits nothing is said:
        the published counts of OLMoE differ by 0.03 bits and more between kinds of text.
        """
        s = self.statistics
        scarce = np.maximum(1.0, s.window_tokens * self.top_k / np.maximum(assignments, 1))
        return np.asarray(2 * (s.drift_excess * scarce + self.drift_floor(assignments)) + 0.01)

    def imbalance_limit(self, tokens: Any) -> Floats:
        """Highest imbalance that a change of traffic explains, [layers].

        Between kinds of text the published counts of OLMoE go up to 2.6 times higher, and to 0.85 of the worst
        possible; the limit is 3.5 times the deployment's own highest, or 0.9 of the way from there to the worst.
        """
        now, then = self._floors(tokens, statistics.imbalance_floor)
        normal = np.minimum(self.statistics.imbalance * np.maximum(1.0, now / then), self.worst_imbalance)
        return np.asarray(np.minimum(3.5 * normal, normal + 0.9 * (self.worst_imbalance - normal)))

    def cv_limit(self, tokens: Any) -> Floats:
        """As :meth:`imbalance_limit` for the coefficient of variation: half way from normal to the worst possible.

        No multiple of normal: what the published texts would suggest for one does not hold for a text that was left
        out (``benchmarks/alert_limits.py``).
        """
        s = self.statistics
        now = statistics.cv_floor(tokens, self.experts, self.top_k)
        then = statistics.cv_floor(s.window_tokens, self.experts, self.top_k)
        worst = math.sqrt(max(self.worst_imbalance - 1, 0))
        normal = np.minimum(np.sqrt(s.cv**2 + np.maximum(now**2 - then**2, 0)), worst)
        return np.asarray((normal + worst) / 2)

    def silent(self, counts: Any, tokens: Any, least: float = 1000.0) -> NDArray[np.int64]:
        """Experts without a token where the baseline expects at least ``least``, by layer.

        In the published counts of OLMoE a change of text left every expert at least 0.008 of its former load, so of
        1,000 expected tokens about 8 come; none by chance then has a probability of 0.0004 a window.
        """
        share = self.statistics.counts / np.maximum(self.statistics.tokens, 1)[:, None]
        expected = share * np.asarray(tokens, dtype=np.float64)[:, None]
        return np.asarray(((np.asarray(counts) == 0) & (expected >= least)).sum(axis=-1), dtype=np.int64)

    def rank_imbalance(self, ranks: list[list[int]]) -> Floats:
        """Busiest expert-parallel rank over the mean rank, [layers], were the baseline's load placed so."""
        counts = self.statistics.counts
        return statistics.imbalance(np.stack([counts[:, experts].sum(axis=1) for experts in ranks], axis=1))

    def rank_imbalance_limit(self, ranks: list[list[int]]) -> Floats:
        """2.6 times the normal, or half way to all on one rank.

        Between the published texts, over 8 ranks, it goes up to 1.97 times; the margin is what holds on each text when
        the multiple is chosen on the others (``benchmarks/alert_limits.py``).
        """
        normal = self.rank_imbalance(ranks)
        return np.asarray(np.minimum(2.6 * normal, (normal + len(ranks)) / 2))

    def _floors(self, tokens: Any, floor: Any) -> tuple[Floats, Floats]:
        pairs = (tokens, self.statistics.window_tokens)
        made = [np.array([floor(float(n), self.experts, self.top_k) for n in np.asarray(p)]) for p in pairs]
        return made[0], made[1]


def summarise(
    windows: list[NDArray[np.int64]],
    model_name: str,
    layers: tuple[int, ...],
    experts: int,
    top_k: int,
    window_seconds: float,
) -> Model:
    """Make a baseline of windows, each the rows [layers, width] routed in it (see :class:`RowLayout`).

    Windows without a token in some layer are left out. Raises BaselineError when fewer than MIN_WINDOWS remain.
    """
    layout = RowLayout(experts)
    stack = np.stack(windows) if windows else np.zeros((0, len(layers), layout.width), dtype=np.int64)
    used = stack[(layout.column(stack, "experts").sum(axis=-1) > 0).all(axis=-1)]
    if len(used) < MIN_WINDOWS:
        raise BaselineError(
            f"{model_name}: tokens were routed in {len(used)} of {len(windows)} windows, at least {MIN_WINDOWS} are "
            "needed; record for longer, or while there is traffic"
        )
    counts = layout.column(used, "experts").astype(np.float64)
    tokens = layout.column(used, "tokens").astype(np.float64)
    whole = counts.sum(axis=0)
    rest = whole - counts
    per_token = whole.sum(axis=-1) / np.maximum(tokens.sum(axis=0), 1)
    drift = statistics.js_divergence(counts, rest)
    excess = drift - statistics.js_floor(counts.sum(axis=-1), rest, per_token)
    means = {}
    for name in ("entropy", "mass"):
        sums = layout.column(used, f"{name}_sum") / FIXED_POINT
        means[name] = sums.sum(axis=0) / np.maximum(tokens.sum(axis=0), 1)
        means[f"{name}_deviation"] = (sums / np.maximum(tokens, 1)).std(axis=0)
    found = LayerStatistics(
        counts=whole,
        tokens=tokens.sum(axis=0),
        window_tokens=np.median(tokens, axis=0),
        imbalance=statistics.imbalance(counts).max(axis=0),
        cv=statistics.cv(counts).max(axis=0),
        drift=drift.mean(axis=0),
        drift_excess=np.maximum(excess.max(axis=0), 0.0),
        **means,
    )
    return Model(model_name, experts, top_k, layers, time.time(), len(used), window_seconds, found)


def write(path: Path, models: list[Model]) -> None:
    """Replace the file at once, so that a reader never sees half of it. Raises BaselineError."""
    text = json.dumps({"format": FORMAT, "version": VERSION, "models": [_to_json(m) for m in models]}, indent=1) + "\n"
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)  # servers and exporters of other users read it
        os.replace(file.name, path)
    except OSError as error:
        raise BaselineError(f"cannot write the baseline {str(path)!r}: {error.strerror}") from error


def read(path: Path) -> dict[str, Model]:
    """The baselines of a file by model name. Raises BaselineError for anything but a whole file of this version."""

    def refuse(why: str) -> BaselineError:
        return BaselineError(f"{str(path)!r} is not a usable baseline: {why}")

    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise BaselineError(f"cannot read the baseline {str(path)!r}: {error.strerror}") from error
    if len(text) > _MAX_BYTES:
        raise refuse("it is too large")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise refuse("it is not JSON") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise refuse("it was not written by `moe-monitor baseline record`")
    if data.get("version") != VERSION:
        raise refuse(f"it has version {data.get('version')!r}, this moe-monitor reads version {VERSION}")
    try:
        models = [_from_json(entry) for entry in data["models"]]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise refuse("its content is damaged") from None
    if not models:
        raise refuse("it holds no model")
    return {model.model_name: model for model in models}


def _to_json(model: Model) -> dict[str, Any]:
    rows = []
    for i, layer in enumerate(model.layers):
        row: dict[str, Any] = {"layer": layer}
        for name in _COLUMNS:
            value = getattr(model.statistics, name)[i].tolist()
            row[name] = [int(n) for n in value] if name == "counts" else value
        rows.append(row)
    head = {f.name: getattr(model, f.name) for f in fields(Model) if f.name not in ("layers", "statistics")}
    return head | {"layers": rows}


def _from_json(entry: dict[str, Any]) -> Model:
    rows = entry["layers"]
    experts, top_k = int(entry["experts"]), int(entry["top_k"])
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in _COLUMNS}
    shapes = {name: (len(rows), experts) if name == "counts" else (len(rows),) for name in _COLUMNS}
    layers = tuple(int(row["layer"]) for row in rows)
    for name, column in columns.items():
        if column.shape != shapes[name] or not np.isfinite(column).all() or (column < 0).any():
            raise ValueError(name)
    if not rows or list(layers) != sorted(set(layers)) or not 0 < top_k <= experts:
        raise ValueError(layers)
    if not (columns["counts"].sum(axis=-1) > 0).all():
        raise ValueError("a layer without tokens")
    recorded, seconds = float(entry["recorded"]), float(entry["window_seconds"])
    if not (math.isfinite(recorded) and math.isfinite(seconds)):
        raise ValueError(recorded)
    name, windows = str(entry["model_name"]), int(entry["windows"])
    return Model(name, experts, top_k, layers, recorded, windows, seconds, LayerStatistics(**columns))
