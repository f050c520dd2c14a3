"""The live view: which layer, which expert, how far from balanced, now.

:func:`screen` draws one engine into a given width and height and keeps no state; :class:`Tracker` holds what the
trailing window and the rates need.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from moe_monitor import statistics
from moe_monitor.board import BoardError
from moe_monitor.cli.heatmap import LEGEND, Shape, bars, group_loads
from moe_monitor.export.families import STALE_SECONDS
from moe_monitor.export.windows import History
from moe_monitor.layout import FIXED_POINT
from moe_monitor.snapshot import EngineSnapshot, read_engines

#: Length of the heat map's trailing window, unless told otherwise, and of the one that tokens/s is taken over.
WINDOW = 60.0
RATE_WINDOW = 5.0

REFRESH_SECONDS = 0.5


def plain(text: str) -> str:
    """Without control characters: names come from other processes and must not steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def tokens_of(rows: NDArray[np.int64], engine: EngineSnapshot) -> int:
    """Tokens through the model: every token passes every layer once, so the layer with most has them all."""
    if engine.layout is None or not len(rows):
        return 0
    return int(engine.layout.column(rows, "tokens").max())


@dataclass(frozen=True)
class View:
    """One engine as it is shown. ``rows``: counters of the last ``seconds``, or since start when that is None."""

    engine: EngineSnapshot
    rows: NDArray[np.int64]
    seconds: float | None
    tokens_per_second: float


class Tracker:
    """Turns successive snapshots into views. One per reader; not thread-safe.

    ``window``: length of the trailing window in seconds. ``from_start``: watching since before the engines started,
    see :class:`History`.
    """

    def __init__(self, window: float = WINDOW, *, from_start: bool = False) -> None:
        self._window = window
        self._history = History(from_start=from_start)
        self._seen: dict[tuple[str, str, str], float] = {}
        self._totals: dict[tuple[str, str, str], deque[tuple[float, int]]] = {}

    def update(self, engines: list[EngineSnapshot], now: float | None = None) -> list[View]:
        now = time.monotonic() if now is None else now
        self._history.add(engines, now)
        return [self._view(engine, now) for engine in engines]

    def _view(self, engine: EngineSnapshot, now: float) -> View:
        seen = self._seen.setdefault(engine.key, now)
        totals = self._totals.setdefault(engine.key, deque())
        totals.append((now, tokens_of(engine.rows, engine)))
        while len(totals) > 2 and totals[1][0] <= now - RATE_WINDOW:
            totals.popleft()
        elapsed, gained = now - totals[0][0], totals[-1][1] - totals[0][1]
        rate = max(0.0, gained / elapsed) if elapsed > 0 else 0.0
        rows = self._history.window(engine, self._window, now)
        if tokens_of(rows, engine) == 0:  # nothing lately: what there was is more use than an empty map
            return View(engine, engine.rows, None, rate)
        return View(engine, rows, min(self._window, max(1.0, now - seen)), rate)


class screen:  # noqa: N801  (used like a function; a class because rich asks it for its lines once the size is known)
    """One engine, drawn to fit the console. ``notes``: lines under the header, such as the address of /metrics."""

    def __init__(self, view: View | None, notes: list[str], others: int = 0) -> None:
        self.view = view
        self.notes = notes
        self.others = others

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or console.height
        yield Group(*self._lines(width, height))

    def _lines(self, width: int, height: int) -> Iterator[Text]:
        notes = [Text(" " + plain(line), style="dim", no_wrap=True, overflow="ellipsis") for line in self.notes]
        if self.view is None:
            yield Text(" moe-monitor", style="bold")
            yield Text(" Waiting for a monitored server.", style="yellow")
            yield from notes
            return
        engine = self.view.engine
        yield _title(engine, self.others)
        yield _state(self.view)
        yield from notes
        yield Text()
        used = 4 + len(notes)
        if engine.layout is None or not engine.layers:
            yield Text(" This model has no mixture-of-experts layers to show.", style="yellow")
            return
        if tokens_of(self.view.rows, engine) == 0:
            yield Text(" No token has been routed yet.", style="yellow")
            return
        yield from _matrix(self.view, width, height - used - 2)
        yield Text()
        meaning = ("  imbal = hottest/mean; floor = by chance", "dim")
        yield Text.assemble(" ", LEGEND, meaning, no_wrap=True, overflow="ellipsis")


def _title(engine: EngineSnapshot, others: int) -> Text:
    experts = engine.layout.experts if engine.layout else 0
    text = Text(" ", no_wrap=True, overflow="ellipsis")
    text.append(plain(engine.model_name), style="bold")
    text.append(f"  engine {plain(engine.engine)}")
    if experts:
        text.append(f"  {len(engine.layers)} layers x {experts} experts, top-{engine.top_k}")
    if others:
        text.append(f"  (+{others} more: --model, --engine)", style="dim")
    return text


def state(engine: EngineSnapshot) -> tuple[str, str]:
    """Whether the engine is monitored, in words, and the style to say it in."""
    if not engine.status.active:
        return f"not active: {plain(engine.status.reason) or 'no reason given'}", "bold yellow"
    if engine.age >= STALE_SECONDS:
        return f"silent for {engine.age:.0f} s: the worker has not published", "bold red"
    return f"active ({plain(engine.status.capture)})", "bold green"


def _state(view: View) -> Text:
    engine = view.engine
    words, style = state(engine)
    text = Text(" ", no_wrap=True, overflow="ellipsis")
    text.append("● " + words, style=style)
    text.append(f"   {tokens_of(engine.rows, engine):,}", style="bold")
    text.append(" tokens  ")
    text.append(f"{view.tokens_per_second:,.0f}", style="bold")
    text.append(" tokens/s")
    if engine.layout and len(view.rows):
        tokens = engine.layout.column(view.rows, "tokens").sum()
        if tokens:
            mean = engine.layout.column(view.rows, "entropy_sum").sum() / FIXED_POINT / tokens
            text.append(f"  router entropy {mean:.2f}")
    return text


@dataclass(frozen=True)
class _Column:
    """A column of numbers beside the map: its heading, width, and the text for a layer by its position."""

    heading: str
    width: int
    cell: Callable[[int], str]


def _columns(view: View) -> list[_Column]:
    """In order of importance; the last ones go when there is no room."""
    engine = view.engine
    layout = engine.layout
    assert layout is not None
    counts = layout.column(view.rows, "experts")
    tokens = layout.column(view.rows, "tokens")
    imbalance = statistics.imbalance(counts)
    hottest, assigned = counts.argmax(axis=1), counts.sum(axis=1)
    entropy = layout.column(view.rows, "entropy_sum") / FIXED_POINT
    idle = statistics.idle(counts)

    def floor(i: int) -> str:
        return number(statistics.imbalance_floor(int(tokens[i]), layout.experts, engine.top_k))

    def hot(i: int) -> str:
        return f"#{hottest[i]} {counts[i, hottest[i]] / assigned[i]:.1%}" if assigned[i] else "-"

    return [
        _Column("imbal", 6, lambda i: number(imbalance[i])),
        _Column("floor", 6, floor),
        _Column("entropy", 8, lambda i: number(entropy[i] / tokens[i] if tokens[i] else math.nan)),
        _Column("hottest", 11, hot),
        _Column("idle", 5, lambda i: str(idle[i])),
        _Column("tokens", 12, lambda i: f"{tokens[i]:,}"),
    ]


def number(value: float) -> str:
    """Two decimals; a dash where there is no value."""
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _matrix(view: View, width: int, height: int) -> Iterator[Text]:
    """The heat map with its columns: a heading and at most ``height - 1`` lines."""
    engine = view.engine
    assert engine.layout is not None
    counts = engine.layout.column(view.rows, "experts")
    label = max(len(str(max(engine.layers))), 2) + 1
    columns = _columns(view)
    shape = Shape.fit(engine.layout.experts, width - label - 1, [c.width for c in columns], len(counts), height - 1)
    columns = columns[: shape.columns]
    span = "since start" if view.seconds is None else f"last {view.seconds:.0f} s"
    what = f"load per expert, {span}" + (f"; {shape.group} per column, hottest shown" if shape.group > 1 else "")
    heading = Text(" " * label + what[: shape.map_width].ljust(shape.map_width), style="dim")
    for column in columns:
        heading.append(column.heading.rjust(column.width))
    yield heading
    # More layers than lines: the most imbalanced are shown, in the model's order.
    imbalance = np.nan_to_num(statistics.imbalance(counts))
    shown = np.sort(np.argsort(-imbalance, kind="stable")[: shape.layers])
    loads = group_loads(counts, shape.group)
    for position in shown:
        lines = bars(loads[position], shape.rows, shape.cell)
        for n, line in enumerate(lines):
            last = n == len(lines) - 1
            text = Text(str(engine.layers[position]).rjust(label - 1) + " " if last else " " * label, style="bold")
            text.append_text(line)
            for column in columns if last else ():
                text.append(column.cell(position).rjust(column.width), style="bold" if column is columns[0] else "")
            yield text
        if shape.gap:
            yield Text()
    if shape.layers < len(counts):
        yield Text(f" {len(counts) - shape.layers} less imbalanced layers not shown", style="dim")


def read(directory: Path) -> list[EngineSnapshot]:
    """All engines; none when the run directory is missing or unusable (`moe-monitor doctor` says why)."""
    with contextlib.suppress(BoardError):
        return read_engines(directory)
    return []


def watch(
    console: Console,
    draw: Callable[[], RenderableType],
    running: Callable[[], bool],
    interval: float = REFRESH_SECONDS,
) -> None:
    """Show ``draw()`` on the whole screen until ``running()`` says no. KeyboardInterrupt passes through."""
    with Live(draw(), console=console, screen=True, auto_refresh=False) as live:
        while running():
            live.update(draw(), refresh=True)
            time.sleep(interval)
