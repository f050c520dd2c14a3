"""Prometheus text and OpenMetrics from families, fast enough for large models.

prometheus_client formats about 150,000 samples a second, and does so on the event loop of the server whose /metrics
it serves; 58 layers x 256 experts would stall token streaming for 100 ms. Here the text of names and labels is made
once per set of series and kept, so that a scrape only formats numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from moe_monitor.catalog import Metric
from moe_monitor.export.families import Exemplar, Family, Labels

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

#: Renderings after which the text of series that are gone is forgotten.
_KEEP = 100

_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def escape(value: str) -> str:
    """A label value as it stands between quotes. Carriage returns and lone surrogates would break line readers."""
    return value.translate(_ESCAPES).replace("\r", r"\\r").encode("utf-8", "replace").decode()


def _number(value: Any) -> str:
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond what a sample can hold
        number = math.inf if value > 0 else -math.inf
    if number.is_integer() and abs(number) < 1e15:
        return str(int(number))
    return repr(number) if np.isfinite(number) else ("NaN" if number != number else "+Inf" if number > 0 else "-Inf")


def _bound(value: float) -> str:
    return repr(float(value))


class Exposition:
    """Writes families; keeps the text of names and labels between calls. Not thread-safe."""

    def __init__(self) -> None:
        self._prefixes: dict[tuple[str, Labels], tuple[list[Labels], list[str], int]] = {}
        self._round = 0

    def render(self, families: Iterable[Family], *, openmetrics: bool = False) -> bytes:
        """The exposition of all families, grouped by metric, each with HELP and TYPE; OpenMetrics ends in ``# EOF``."""
        self._round += 1
        grouped: dict[str, list[Family]] = {}
        for family in families:
            if not family.labels:
                continue
            grouped.setdefault(family.metric.name, []).append(family)
        parts: list[str] = []
        for members in grouped.values():
            metric = members[0].metric
            parts.append(_head(metric, openmetrics))
            for family in members:
                self._series(parts, family, openmetrics)
        if openmetrics:
            parts.append("# EOF\n")
        if self._round % _KEEP == 0:  # servers come and go
            old = self._round - _KEEP
            self._prefixes = {key: kept for key, kept in self._prefixes.items() if kept[2] > old}
        return "".join(parts).encode()

    def _series(self, parts: list[str], family: Family, openmetrics: bool) -> None:
        prefixes = self._prefix(family)
        if family.metric.kind != "histogram":
            values = family.values
            if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
                texts: Iterable[str] = map(str, values.tolist())
            else:
                texts = map(_number, values)
            parts.append("".join(itertools.chain.from_iterable(zip(prefixes, texts, itertools.repeat("\n")))))
            return
        cumulative = np.cumsum(np.asarray(family.values, dtype=np.int64), axis=-1)
        numbers: list[str] = []
        exemplars = family.exemplars if openmetrics else None  # the text format has no place for them
        for i, (row, total) in enumerate(zip(cumulative.tolist(), np.asarray(family.sums).tolist(), strict=True)):
            if exemplars is None:
                numbers.extend(map(str, row))
            else:
                numbers.extend(f"{n}{_exemplar(e)}" for n, e in zip(row, exemplars[i], strict=True))
            numbers.append(str(row[-1]))
            numbers.append(_number(total))
        parts.append("".join(itertools.chain.from_iterable(zip(prefixes, numbers, itertools.repeat("\n")))))

    def _prefix(self, family: Family) -> list[str]:
        key = (family.metric.name, family.common)
        kept = self._prefixes.get(key)
        if kept is not None and kept[0] == family.labels:
            labels, made, _ = kept
        else:
            labels, made = list(family.labels), [p for labels in family.labels for p in _prefixes(family, labels)]
        self._prefixes[key] = (labels, made, self._round)
        return made


def _exemplar(exemplar: Exemplar | None) -> str:
    if exemplar is None:
        return ""
    trace, value, at = exemplar
    return f' # {{trace_id="{escape(trace)}"}} {_number(value)} {at:.3f}'


def _head(metric: Metric, openmetrics: bool) -> str:
    name, kind = metric.name, str(metric.kind)
    if openmetrics:
        name = name.removesuffix("_total") if kind == "counter" else name.removesuffix("_info")
    elif kind == "info":
        kind = "gauge"
    help_text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
    return f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n"


def _prefixes(family: Family, labels: Labels) -> list[str]:
    metric = family.metric
    pairs = zip(family.names, family.common + labels, strict=True)
    text = ",".join(f'{name}="{escape(value)}"' for name, value in pairs)
    if metric.kind != "histogram":
        return [f"{metric.name}{{{text}}} "]
    bounds = [*map(_bound, metric.buckets), "+Inf"]
    buckets = [f'{metric.name}_bucket{{{text},le="{bound}"}} ' for bound in bounds]
    return [*buckets, f"{metric.name}_count{{{text}}} ", f"{metric.name}_sum{{{text}}} "]
