"""Prometheus text and OpenMetrics from families, fast enough for large models.

prometheus_client formats about 150,000 samples a second, and does so on the event loop of the server whose /metrics
it serves; 58 layers x 256 experts would stall token streaming for 100 ms. Here the text of names and labels is made
once per set of series and kept as a template with holes for the numbers, so that a scrape only fills them in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
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
    return repr(number) if math.isfinite(number) else ("NaN" if number != number else "+Inf" if number > 0 else "-Inf")


def _bound(value: float) -> str:
    return repr(float(value))


class Exposition:
    """Writes families; keeps the text of names and labels between calls. Not thread-safe.

    pause: called after each family, see :class:`~moe_monitor.export.collector.MoeCollector`.
    """

    def __init__(self, pause: Callable[[], None] = lambda: None) -> None:
        self._pause = pause
        self._templates: dict[tuple[str, Labels, bytes], tuple[list[Labels], bytes, int]] = {}
        self._round = 0

    def render(self, families: Iterable[Family], *, openmetrics: bool = False) -> bytes:
        """The exposition of all families, grouped by metric, each with HELP and TYPE; OpenMetrics ends in ``# EOF``."""
        return b"".join(self.parts(families, openmetrics=openmetrics))

    def parts(self, families: Iterable[Family], *, openmetrics: bool = False) -> Iterator[bytes]:
        """The same piece by piece; to be exhausted before the next begins."""
        self._round += 1
        grouped: dict[str, list[Family]] = {}
        for family in families:
            if not family.labels:
                continue
            grouped.setdefault(family.metric.name, []).append(family)
        for members in grouped.values():
            yield _head(members[0].metric, openmetrics).encode()
            for family in members:
                histogram = family.metric.kind == "histogram"
                yield self._histogram(family, openmetrics) if histogram else self._plain(family)
                self._pause()
        if openmetrics:
            yield b"# EOF\n"
        if self._round % _KEEP == 0:  # servers come and go
            old = self._round - _KEEP
            self._templates = {key: kept for key, kept in self._templates.items() if kept[2] > old}

    def _plain(self, family: Family) -> bytes:
        values = family.values
        if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
            return self._template(family, b"%d") % tuple(values.ravel().tolist())
        return self._template(family, b"%b") % tuple(_number(value).encode() for value in values)

    def _histogram(self, family: Family, openmetrics: bool) -> bytes:
        cumulative = np.cumsum(np.asarray(family.values, dtype=np.int64), axis=-1).tolist()
        sums = np.asarray(family.sums).tolist()
        exemplars = family.exemplars if openmetrics else None  # the text format has no place for them
        numbers: list[int | bytes] = []
        for i, (row, total) in enumerate(zip(cumulative, sums, strict=True)):
            if exemplars is None:
                numbers += row
            else:
                numbers += [f"{n}{_exemplar(e)}".encode() for n, e in zip(row, exemplars[i], strict=True)]
            numbers += (row[-1], _number(total).encode())
        return self._template(family, b"%d" if exemplars is None else b"%b") % tuple(numbers)

    def _template(self, family: Family, hole: bytes) -> bytes:
        """All lines of a family; ``hole`` stands for the numbers of series, and for those of a histogram's buckets."""
        key = (family.metric.name, family.common, hole)
        kept = self._templates.get(key)
        if kept is not None and (kept[0] is family.labels or kept[0] == family.labels):
            labels, made, _ = kept
        else:
            labels, made = family.labels, b"".join(_lines(family, labels, hole) for labels in family.labels)
        self._templates[key] = (labels, made, self._round)
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


def _lines(family: Family, labels: Labels, hole: bytes) -> bytes:
    """The lines of one series, for ``%``; a histogram has holes for buckets, count and sum, in this order."""
    metric = family.metric
    pairs = zip(family.names, family.common + labels, strict=True)
    text = ",".join(f'{name}="{escape(value)}"' for name, value in pairs)
    if metric.kind != "histogram":
        return f"{metric.name}{{{text}}} ".replace("%", "%%").encode() + hole + b"\n"
    bounds = [*map(_bound, metric.buckets), "+Inf"]
    lines = [(f'{metric.name}_bucket{{{text},le="{bound}"}} ', hole) for bound in bounds]
    lines += [(f"{metric.name}_count{{{text}}} ", b"%d"), (f"{metric.name}_sum{{{text}}} ", b"%b")]
    return b"".join(line.replace("%", "%%").encode() + end + b"\n" for line, end in lines)
