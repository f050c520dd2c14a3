"""Bars for expert load: height and colour both say how an expert's load compares with the mean.

Height is linear up to :data:`FULL` times the mean, so that maps of different moments, layers and models compare;
colour goes on above that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

#: Load over mean at which a bar is full.
FULL = 4.0

_BLOCKS = " ▁▂▃▄▅▆▇█"
_IDLE = "·"

#: Load over mean -> colour, from cold to hot; a load takes the last one whose bound it reaches.
_COLOURS = (
    (0.0, "#4a5a8a"),
    (0.25, "#3b73a8"),
    (0.5, "#2a8f9d"),
    (0.8, "#2fa874"),
    (1.25, "#7cc34a"),
    (2.0, "#d9cf2b"),
    (3.0, "#ffab2e"),
    (4.0, "#ff6a3d"),
    (6.0, "#ff3048"),
)

#: Most lines that one layer's bars take.
_TALLEST = 6


def colour(load: float) -> str:
    """Colour of a load given over the mean."""
    return next(name for bound, name in reversed(_COLOURS) if load >= bound)


def _legend() -> Text:
    text = Text("load/mean ", style="dim")
    text.append(f"{_IDLE}0 ", style="dim")
    for load, label in ((0.5, "½"), (1.0, "1"), (2.0, "2"), (4.0, "4")):
        text.append(_BLOCKS[round(load / FULL * 8)], style=colour(load))
        text.append(label + " ", style="dim")
    text.append("█", style=colour(6))
    text.append("6+", style="dim")
    return text


LEGEND = _legend()


def group_loads(counts: NDArray[np.int64], group: int) -> NDArray[np.float64]:
    """``counts`` [layers, experts] -> load over mean of the hottest expert of each group, [layers, columns]."""
    mean = counts.mean(axis=1, keepdims=True)
    loads = np.divide(counts, mean, out=np.zeros(counts.shape), where=mean > 0)
    spare = -counts.shape[1] % group
    padded = np.pad(loads, ((0, 0), (0, spare)))
    return np.asarray(padded.reshape(len(counts), -1, group).max(axis=2))


def bars(loads: NDArray[np.float64], rows: int, cell: int) -> list[Text]:
    """One layer's loads (over mean) as ``rows`` lines, top first, each load ``cell`` characters wide."""
    eighths = np.ceil(np.minimum(loads / FULL, 1.0) * rows * 8).astype(int).tolist()
    colours = [colour(load) for load in loads.tolist()]
    lines = []
    # From three characters on, one of them separates the bars.
    filled, blank = (cell - 1, " ") if cell > 2 else (cell, "")
    for row in range(rows - 1, -1, -1):
        line = Text(no_wrap=True)
        for height, style in zip(eighths, colours, strict=True):
            if height == 0 and row == 0:
                line.append(_IDLE.ljust(filled) + blank, style="dim")
            else:
                line.append(_BLOCKS[min(max(height - row * 8, 0), 8)] * filled + blank, style=style)
        lines.append(line)
    return lines


@dataclass(frozen=True)
class Shape:
    """How a map fills its space: ``group`` experts per bar, each ``cell`` wide and ``rows`` high, ``gap`` lines
    between layers, ``layers`` of them shown, ``columns`` columns of numbers beside it."""

    group: int
    cell: int
    map_width: int
    columns: int
    layers: int
    rows: int
    gap: int

    @classmethod
    def fit(cls, experts: int, width: int, columns: list[int], layers: int, height: int) -> Shape:
        """The first two columns of numbers always stay; further ones only where they cost no resolution."""
        room = max(8, width - sum(columns[:2]))
        group = -(-experts // room)
        bars_wide = -(-experts // group)
        kept, taken = 2, sum(columns[:2])
        while kept < len(columns) and taken + columns[kept] + bars_wide <= width:
            taken += columns[kept]
            kept += 1
        cell = max(1, min(4, (width - taken) // bars_wide))
        height = max(1, height)
        shown = layers if layers <= height else max(1, height - 1)
        rows = max(1, min(_TALLEST, height // shown))
        gap = 0
        if rows > 2 or (rows == 2 and shown * 3 <= height):
            gap = 1
            rows = min(rows, max(1, height // shown - 1))
        return cls(group, cell, cell * bars_wide, kept, shown, rows, gap)
