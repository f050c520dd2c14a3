"""How preview.py draws each kind of panel."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.dates import AutoDateLocator, DateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PAGE, CARD, TEXT, DIM, RULE = "#111217", "#181b1f", "#d8d9da", "#8e9297", "#2c3235"
COLORS = {
    "green": "#56a64b",
    "yellow": "#e0b400",
    "orange": "#ff780a",
    "red": "#e02f44",
    "blue": "#5794f2",
    "gray": "#8e9297",
}
PALETTE = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#96d98d", "#ffb357", "#ca95e5"]

#: Grafana's names of colour schemes -> matplotlib's.
SCHEMES = {"RdYlBu": "RdYlBu", "Oranges": "Oranges", "continuous-BlYlRd": "RdYlBu_r"}

Answers = list[list[dict[str, Any]]]


@dataclass
class Frame:
    figure: Figure
    box: tuple[float, float, float, float]
    panel: dict[str, Any]
    answers: Answers
    span: tuple[float, float]
    marks: list[tuple[float, str]]

    @property
    def defaults(self) -> dict[str, Any]:
        found: dict[str, Any] = self.panel.get("fieldConfig", {}).get("defaults", {})
        return found

    def inches(self) -> tuple[float, float]:
        width, height = self.figure.get_size_inches()
        return self.box[2] * width, self.box[3] * height

    def axes(self, left: float, bottom: float, right: float, top: float) -> Axes:
        """Axes inside the card, with these margins in inches."""
        x, y, w, h = self.box
        width, height = self.figure.get_size_inches()
        place = (x + left / width, y + bottom / height, w - (left + right) / width, h - (bottom + top) / height)
        made = self.figure.add_axes((place[0], place[1], max(place[2], 0.001), max(place[3], 0.001)))
        made.set_facecolor("none")
        for edge in made.spines.values():
            edge.set_visible(False)
        made.tick_params(colors=DIM, labelsize=7, length=0)
        return made


def threshold_color(value: float, thresholds: dict[str, Any]) -> str:
    color = "green"
    for step in thresholds.get("steps", []):
        if step.get("value") is None or value >= step["value"]:
            color = step["color"]
    return COLORS.get(color, color)


def show(value: float, unit: str, decimals: int | None = None) -> str:
    """A number as Grafana writes it in this unit."""
    if value is None or math.isnan(value):
        return "-"
    if unit == "percentunit":
        return f"{value * 100:.{0 if decimals is None else decimals}f}%"
    if unit == "s":
        for limit, factor, name in ((1e-3, 1e6, "µs"), (1, 1e3, "ms"), (120, 1, "s"), (7200, 1 / 60, "min")):
            if abs(value) < limit:
                return f"{value * factor:.{1 if decimals is None else decimals}f} {name}"
        return f"{value / 3600:.1f} h" if value < 172800 else f"{value / 86400:.1f} d"
    if unit == "flops":
        for limit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= limit:
                return f"{value / limit:.{1 if decimals is None else decimals}f} {name}FLOP/s"
        return f"{value:.0f} FLOP/s"
    suffix = unit.removeprefix("suffix:") if unit.startswith("suffix:") else " req/s" if unit == "reqps" else ""
    if abs(value) >= 10_000:
        scale = 1e6 if abs(value) >= 1e6 else 1e3
        return f"{value / scale:.1f}{'M' if scale == 1e6 else 'k'}{suffix}"
    if decimals is None:
        decimals = 0 if float(value).is_integer() else 2 if abs(value) < 100 else 0
    return f"{value:.{decimals}f}{suffix}"


def overrides(panel: dict[str, Any], name: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for entry in panel.get("fieldConfig", {}).get("overrides", []):
        if entry["matcher"]["id"] == "byName" and entry["matcher"]["options"] == name:
            made |= {p["id"]: p.get("value") for p in entry["properties"]}
    return made


def draw(frame: Frame) -> bool:
    """Draw a panel into its box. False when it should show data and has none."""
    x, y, w, h = frame.box
    width, height = frame.figure.get_size_inches()
    gap = 0.04
    if frame.panel["type"] == "row":
        frame.figure.text(
            x + 0.006, y + h / 2, frame.panel["title"], color=TEXT, fontsize=11, va="center", weight="bold"
        )
        return True
    card = Rectangle(
        (x + gap / width, y + gap / height),
        w - 2 * gap / width,
        h - 2 * gap / height,
        transform=frame.figure.transFigure,
        facecolor=CARD,
        edgecolor=RULE,
        linewidth=0.8,
        zorder=-1,  # behind the axes, which have 0
    )
    frame.figure.add_artist(card)
    fits = int(frame.inches()[0] * 13)
    title = textwrap.shorten(frame.panel["title"], fits, placeholder="…")
    frame.figure.text(x + 0.12 / width, y + h - 0.2 / height, title, color=TEXT, fontsize=8.5, va="center")
    kind = frame.panel["type"]
    if kind != "text" and not any(series["values"] for answer in frame.answers for series in answer):
        words = frame.defaults.get("noValue", "No data")
        frame.figure.text(x + w / 2, y + h / 2, words, color=DIM, fontsize=11, ha="center", va="center")
        return False
    DRAW[kind](frame)
    return True


def stat(frame: Frame) -> None:
    series = frame.answers[0][0]["values"]
    value, unit = series[-1][1], frame.defaults.get("unit", "short")
    colored = frame.panel["options"]["colorMode"] == "background"
    color = threshold_color(value, frame.defaults["thresholds"])
    if colored:
        axes = frame.axes(0.05, 0.05, 0.05, 0.36)
        axes.set_facecolor(color)
        axes.set_xticks([])
        axes.set_yticks([])
    if frame.panel["options"].get("graphMode") == "area" and len(series) > 1:
        axes = frame.axes(0.05, 0.05, 0.05, 0.9)
        values = [v for _, v in series]
        axes.fill_between(range(len(values)), min(0, *values), values, color="white" if colored else color, alpha=0.25)
        axes.set_axis_off()
        axes.set_xlim(0, len(values) - 1)
    x, y, w, h = frame.box
    text = show(value, unit, frame.defaults.get("decimals"))
    size = min(26, 68 * frame.inches()[0] / max(len(text), 3))
    white = "white" if colored else color
    frame.figure.text(
        x + w / 2, y + h * 0.44, text, color=white, fontsize=size, ha="center", va="center", weight="bold"
    )


def _time(axes: Axes, frame: Frame) -> None:
    zone = timezone.utc
    axes.set_xlim(*(date2num(datetime.fromtimestamp(t, zone)) for t in frame.span))
    locator = AutoDateLocator(minticks=3, maxticks=6)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M"))


def _dates(times: Any) -> Any:
    return np.asarray(times) / 86400.0  # matplotlib counts days since 1970


def timeseries(frame: Frame) -> None:
    found = [s for answer in frame.answers for s in answer]
    shown = found[:8]
    looks = {series["name"]: overrides(frame.panel, series["name"]) for series in found}
    beside = any(look.get("custom.axisPlacement") == "right" for look in looks.values())
    axes = frame.axes(0.62, 0.42 + 0.17 * len(shown), 0.5 if beside else 0.15, 0.42)
    right = axes.twinx() if beside else axes
    unit, custom = frame.defaults.get("unit", "short"), frame.defaults.get("custom", {})
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    base: Any = 0
    for i, series in enumerate(found):
        special = looks[series["name"]]
        onto, own = (right, special.get("unit", unit)) if "custom.axisPlacement" in special else (axes, unit)
        fixed = special.get("color", {}).get("fixedColor")
        color = COLORS.get(fixed, fixed) if fixed else PALETTE[i % len(PALETTE)]
        t, v = np.array(series["values"]).T
        if stacked and (i == 0 or len(v) == len(base)):
            axes.fill_between(_dates(t), base, base + v, color=color, alpha=0.4, linewidth=0)
            v = base = base + v
        style = (0, (5, 4)) if "custom.lineStyle" in special else "-"
        onto.plot(_dates(t), v, color=color, linewidth=1.1 if "custom.lineStyle" in special else 1.7, linestyle=style)
        if i < len(shown):
            last, high = (show(x, own, frame.defaults.get("decimals")) for x in (v[-1], np.nanmax(v)))
            at = -0.3 - 0.17 * i
            inch = axes.get_position().height * frame.figure.get_size_inches()[1]
            axes.text(
                -0.02, at / inch, f"— {series['name']}", color=color, fontsize=7, transform=axes.transAxes, va="center"
            )
            axes.text(
                1,
                at / inch,
                f"last {last}  max {high}",
                color=DIM,
                fontsize=7,
                transform=axes.transAxes,
                va="center",
                ha="right",
            )
    _time(axes, frame)
    low, high = axes.get_ylim()
    if custom.get("thresholdsStyle", {}).get("mode", "off") != "off":
        for step in frame.defaults["thresholds"]["steps"]:
            if step.get("value") is not None:
                axes.axhline(step["value"], color=COLORS.get(step["color"]), linestyle="--", linewidth=1)
                high = max(high, step["value"] * 1.15)
    axes.set_ylim(frame.defaults.get("min", low), frame.defaults.get("max", high))
    for look in looks.values():
        if "custom.axisPlacement" in look:
            _right(right, look.get("unit", unit), look.get("min"))
    for at, _ in frame.marks:
        axes.axvline(_dates(at), color=COLORS["red"], linewidth=0.7, linestyle=":")
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.yaxis.set_major_formatter(lambda v, _: show(v, unit, frame.defaults.get("decimals") or None))


def _right(axes: Axes, unit: str, low: float | None) -> None:
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.tick_params(colors=DIM, labelsize=7, length=0)
    _, high = axes.get_ylim()
    axes.set_ylim(low, max(high, (low or 0) * 1.5))
    axes.yaxis.set_major_formatter(lambda v, _: show(v, unit, None))


def heatmap(frame: Frame) -> None:
    found = frame.answers[0]
    options = frame.panel["options"]
    times = np.arange(*frame.span, _step(found))
    grid = np.full((len(found), times.size), np.nan)
    for i, series in enumerate(found):
        t, v = np.array(series["values"]).T
        at = np.clip(np.searchsorted(times, t - 1), 0, times.size - 1)
        grid[i, at] = v
    if found and "le" in found[0]["metric"]:  # cumulative buckets, as the heatmap format tells Grafana
        order = np.argsort([float(s["metric"]["le"]) for s in found])
        found, grid = [found[i] for i in order], np.diff(grid[order], axis=0, prepend=0)
        grid[grid <= 0] = np.nan
    grid[grid <= options.get("filterValues", {}).get("le", -math.inf)] = np.nan
    color = options["color"]
    low, high = color.get("min", np.nanmin(grid)), color.get("max", np.nanmax(grid))
    cmap = mpl.colormaps[SCHEMES[color["scheme"]] + ("_r" if color.get("reverse") else "")].copy()
    cmap.set_bad(CARD)
    axes = frame.axes(0.62, 0.32, 0.75, 0.42)
    edges = _dates(np.append(times, times[-1] + _step(found)))
    mesh = axes.pcolormesh(edges, np.arange(len(found) + 1), grid, cmap=cmap, vmin=low, vmax=high, rasterized=True)
    names = [s["name"] for s in found]
    if "le" in found[0]["metric"]:
        bound = options.get("yAxis", {}).get("unit", "short")
        names = [show(float(n), bound) if math.isfinite(float(n)) else n for n in names]
    every = max(1, math.ceil(len(names) / max(4, int(frame.inches()[1] * 4))))
    axes.set_yticks(np.arange(0, len(names), every) + 0.5, names[::every])
    axes.set_ylabel(options.get("yAxis", {}).get("axisLabel", ""), color=DIM, fontsize=7)
    _time(axes, frame)
    bar = frame.figure.colorbar(mesh, ax=axes, fraction=0.03, pad=0.01)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(colors=DIM, labelsize=7, length=0)
    unit = options.get("cellValues", {}).get("unit", "short")
    bar.ax.yaxis.set_major_formatter(lambda v, _: show(v, unit, None))


def _step(found: list[dict[str, Any]]) -> float:
    longest = max(found, key=lambda s: len(s["values"]))["values"]
    return min((b[0] - a[0] for a, b in pairwise(longest)), default=60.0)


def bargauge(frame: Frame) -> None:
    found = [s for answer in frame.answers for s in answer]
    axes = frame.axes(0.7, 0.15, 0.6, 0.42)
    values = [s["values"][-1][1] for s in found]
    unit, decimals = frame.defaults.get("unit", "short"), frame.defaults.get("decimals")
    colors = [threshold_color(v, frame.defaults["thresholds"]) for v in values]
    top = max(values) or 1
    axes.barh(range(len(found)), [top] * len(found), color=RULE, height=0.7)
    axes.barh(range(len(found)), values, color=colors, height=0.7)
    for i, value in enumerate(values):
        axes.text(top * 1.03, i, show(value, unit, decimals), color=TEXT, fontsize=8, va="center")
    axes.set_yticks(range(len(found)), [s["name"] for s in found])
    axes.invert_yaxis()
    axes.set_xticks([])


def table(frame: Frame) -> None:
    kinds = [t["id"] for t in frame.panel.get("transformations", [])]
    (matrix if "groupingToMatrix" in kinds else joined)(frame)


def matrix(frame: Frame) -> None:
    options = next(t["options"] for t in frame.panel["transformations"] if t["id"] == "groupingToMatrix")
    row, column = options["rowField"], options["columnField"]
    cells = {(int(s["metric"][row]), int(s["metric"][column])): s["values"][-1][1] for s in frame.answers[0]}
    rows, columns = (sorted({key[i] for key in cells}) for i in (0, 1))
    axes = frame.axes(0.4, 0.12, 0.12, 0.62)
    norm = Normalize(frame.defaults.get("min"), frame.defaults.get("max"))
    cmap = mpl.colormaps[SCHEMES[frame.defaults["color"]["mode"]]].copy()
    cmap.set_bad(CARD)
    grid = np.array([[cells.get((r, c), np.nan) for c in columns] for r in rows])
    axes.pcolormesh(grid, cmap=cmap, norm=norm, edgecolors=CARD, linewidth=0.4, rasterized=True)
    wide = frame.inches()[0] / len(columns)
    if wide > 0.2:
        for i, j in np.ndindex(*grid.shape):
            if grid[i, j] == grid[i, j]:
                text = f"{grid[i, j]:.{frame.defaults.get('decimals', 1)}f}"
                ink = "#202226" if sum(cmap(norm(grid[i, j]))[:3]) > 1.4 else "white"
                axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=min(8, wide * 24), color=ink)
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    every = max(1, math.ceil(len(columns) / (frame.inches()[0] * 4.5)))
    axes.set_xticks(np.arange(0, len(columns), every) + 0.5, columns[::every])
    down = max(1, math.ceil(len(rows) / (frame.inches()[1] * 6)))
    axes.set_yticks(np.arange(0, len(rows), down) + 0.5, rows[::down])


def joined(frame: Frame) -> None:
    organise = next(t["options"] for t in frame.panel["transformations"] if t["id"] == "organize")
    names, order = organise["renameByName"], organise["indexByName"]
    fields = sorted(names, key=lambda n: order[n])
    keys = [f for f in fields if not f.startswith("Value")]
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    targets = frame.panel["targets"]
    for target, answer in zip(targets, frame.answers, strict=True):
        for series in answer:
            # Grafana would make rows of their own of what has other labels.
            assert set(series["metric"]) <= set(keys), (frame.panel["title"], target["refId"])
            key = tuple(series["metric"].get(k, "") for k in keys)
            value = f"Value #{target['refId']}" if len(targets) > 1 else "Value"
            rows.setdefault(key, {})[value] = series["values"][-1][1]
    sort = frame.panel["options"]["sortBy"][0]
    by = next(f for f in fields if names[f] == sort["displayName"])
    if by in keys:
        ordered = sorted(rows.items(), key=lambda item: item[0][keys.index(by)], reverse=sort["desc"])
    else:
        ordered = sorted(rows.items(), key=lambda item: -item[1].get(by, -math.inf))
    axes = frame.axes(0.1, 0.08, 0.1, 0.38)
    axes.set_axis_off()
    fits = max(1, int((frame.inches()[1] - 0.5) / 0.21) - 1)
    weights = [max(len(names[f]) + 2, *(len(k[keys.index(f)]) + 2 for k in rows)) if f in keys else 10 for f in fields]
    edges = np.concatenate([[0], np.cumsum(weights)]) / sum(weights)
    axes.set_xlim(0, 1)
    axes.set_ylim(fits + 1, 0)
    for j, field in enumerate(fields):
        axes.text(edges[j] + 0.004, 0.5, names[field], color=COLORS["blue"], fontsize=7.5, va="center")
    for i, (key, values) in enumerate(ordered[:fits], start=1):
        for j, field in enumerate(fields):
            look = overrides(frame.panel, names[field])
            if field in keys:
                text = key[keys.index(field)]
            elif field not in values:
                continue
            else:
                value = values[field]
                mapped = {k: v for m in look.get("mappings", []) for k, v in m["options"].items()}.get(f"{value:g}")
                text = mapped["text"] if mapped else show(value, look.get("unit", "short"), look.get("decimals"))
                color = (
                    COLORS[mapped["color"]]
                    if mapped
                    else threshold_color(value, look["thresholds"])
                    if "thresholds" in look
                    else None
                )
                if color:
                    axes.add_patch(
                        Rectangle((edges[j], i + 0.04), edges[j + 1] - edges[j] - 0.002, 0.92, color=color, alpha=0.75)
                    )
            axes.text(edges[j] + 0.004, i + 0.5, text, color=TEXT, fontsize=7.5, va="center")
    if len(ordered) > fits:
        axes.text(1, -0.6, f"{len(ordered) - fits} more rows", color=DIM, fontsize=7, ha="right", va="center")


def text(frame: Frame) -> None:
    axes = frame.axes(0.15, 0.1, 0.15, 0.45)
    axes.set_axis_off()
    plain = frame.panel["options"]["content"].replace("**", "").replace("`", "").replace("#### ", "")
    wide = int(frame.inches()[0] * 15)
    lines = [
        line
        for part in re.split(r"\n\n|\n(?=- |\d+\. )", plain)
        for line in [*textwrap.wrap(re.sub(r"\[(.*?)\]\(.*?\)", r"\1", part), wide), ""]
    ]
    axes.text(0, 1, "\n".join(lines), color=TEXT, fontsize=8, va="top", linespacing=1.5)


DRAW: dict[str, Callable[[Frame], None]] = {
    "stat": stat,
    "timeseries": timeseries,
    "heatmap": heatmap,
    "bargauge": bargauge,
    "table": table,
    "text": text,
}
