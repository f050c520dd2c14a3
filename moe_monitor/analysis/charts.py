"""Charts as SVG text: heat maps, lines, bars. No script, no network, no plotting library."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]

#: Cold to hot through near-white: a load below, at and above the mean. Distinguishable with colour-blind eyes.
DIVERGING: tuple[Colour, ...] = ((33, 74, 145), (120, 165, 214), (244, 244, 240), (233, 150, 92), (158, 42, 31))
#: Light to dark, for shares.
SEQUENTIAL: tuple[Colour, ...] = ((247, 248, 250), (190, 208, 228), (110, 150, 196), (46, 88, 150), (16, 36, 84))
SERIES = ("#2e5896", "#c0622b", "#3d7f5d", "#7a5195", "#5b6470")
UNKNOWN_COLOUR: Colour = (205, 205, 205)


def _mix(scale: Sequence[Colour], at: float) -> Colour:
    at = min(max(at, 0.0), 1.0) * (len(scale) - 1)
    low = min(int(at), len(scale) - 2)
    part = at - low
    return tuple(round(a + (b - a) * part) for a, b in zip(scale[low], scale[low + 1], strict=True))  # type: ignore[return-value]


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def load_colour(ratio: float) -> Colour:
    """Load over the mean, on a doubling scale from a quarter to four times."""
    if not math.isfinite(ratio):
        return UNKNOWN_COLOUR
    return _mix(DIVERGING, 0.5 + math.log2(max(ratio, 1e-9)) / 4)


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{html.escape(text)}</text>'


def _svg(width: float, height: float, body: list[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img" '
        f'aria-label="{html.escape(label, quote=True)}">{"".join(body)}</svg>'
    )


def legend(scale: Sequence[Colour], ticks: Sequence[tuple[float, str]], title: str) -> str:
    """A colour bar; ``ticks`` are (position 0..1, text)."""
    body = [_text(0, 12, title, "start")]
    steps = 60
    body += [
        f'<rect x="{i * 4}" y="18" width="4.4" height="12" fill="{_hex(_mix(scale, i / (steps - 1)))}"/>'
        for i in range(steps)
    ]
    for at, text in ticks:
        anchor = "start" if at == 0 else "end" if at == 1 else "middle"
        body.append(_text(at * steps * 4, 44, text, anchor))
    return _svg(max(steps * 4, 7 * len(title)) + 8, 50, body, title)


def load_map(counts: NDArray[np.int64], layers: Sequence[int]) -> str:
    """Layers x experts, coloured by load over the layer's mean; a cell says its numbers when pointed at."""
    rows, experts = counts.shape
    cell = max(3.0, min(20.0, 980 / experts))
    tall = max(7.0, min(18.0, 420 / rows))
    left, top = 52, 8
    mean = counts.mean(axis=1)
    body = []
    for i, layer in enumerate(layers):
        y = top + i * tall
        if rows <= 24 or i % math.ceil(rows / 24) == 0:
            body.append(_text(left - 6, y + tall / 2 + 4, str(layer), "end"))
        total = int(counts[i].sum())
        for j, n in enumerate(counts[i].tolist()):
            ratio = n / mean[i] if total else math.nan
            fill = _hex(load_colour(ratio) if n or not total else (20, 20, 24))
            said = (
                f"layer {layer}, expert {j}: {n} tokens, {ratio:.2f} x mean" if total else f"layer {layer}: no tokens"
            )
            body.append(
                f'<rect x="{left + j * cell:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{tall:.1f}" fill="{fill}">'
                f"<title>{said}</title></rect>"
            )
    bottom = top + rows * tall
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if experts / s <= 17)
    body += [_text(left + (j + 0.5) * cell, bottom + 15, str(j)) for j in range(0, experts, step)]
    body.append(_text(left + experts * cell / 2, bottom + 32, "expert"))
    body.append(
        _text(12, top + rows * tall / 2, "layer", "middle", f' transform="rotate(-90 12 {top + rows * tall / 2:.0f})"')
    )
    return _svg(left + experts * cell + 8, bottom + 40, body, "load of every expert by layer")


def spread_map(counts: NDArray[np.int64], bounds: Sequence[float], layers: Sequence[int], x_title: str) -> str:
    """Layers x buckets, coloured by the share of the layer's tokens in the bucket; 0 to the largest share.

    ``counts`` [layers, buckets]; bucket i ends at ``bounds[i]``, inclusive, and buckets are drawn equally wide.
    """
    rows, buckets = counts.shape
    wide, tall = 52.0, max(9.0, min(18.0, 420 / rows))
    left, top = 52, 8
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    highest = float(share.max()) or 1.0
    body = []
    for i, layer in enumerate(layers):
        y = top + i * tall
        if rows <= 24 or i % math.ceil(rows / 24) == 0:
            body.append(_text(left - 6, y + tall / 2 + 4, str(layer), "end"))
        for j in range(buckets):
            low = f"{bounds[j - 1]:g}" if j else "0"
            body.append(
                f'<rect x="{left + j * wide:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}" '
                f'fill="{_hex(_mix(SEQUENTIAL, share[i, j] / highest))}"><title>layer {layer}, {low} to '
                f"{bounds[j]:g}: {share[i, j]:.1%} of {int(counts[i].sum())} tokens</title></rect>"
            )
    bottom = top + rows * tall
    body += [_text(left + j * wide, bottom + 15, f"{bounds[j - 1]:g}" if j else "0") for j in range(buckets)]
    body.append(_text(left + buckets * wide, bottom + 15, f"{bounds[buckets - 1]:g}"))
    body.append(_text(left + buckets * wide / 2, bottom + 32, x_title))
    body.append(
        _text(12, top + rows * tall / 2, "layer", "middle", f' transform="rotate(-90 12 {top + rows * tall / 2:.0f})"')
    )
    return _svg(left + buckets * wide + 16, bottom + 40, body, f"{x_title} by layer")


def matrix_image(values: NDArray[np.float64], highest: float, size: int = 260) -> str:
    """A square matrix as a pixel image (data URI), 0 to ``highest``; NaN grey."""
    n = values.shape[0]
    pixels = np.empty((n, n, 3), dtype=np.uint8)
    for i in range(n):
        for j in range(n):
            v = float(values[i, j])
            pixels[i, j] = UNKNOWN_COLOUR if math.isnan(v) else _mix(SEQUENTIAL, v / highest if highest else 0)
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", n, n, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(raw, 9))
        + chunk(b"IEND", b"")
    )
    uri = base64.b64encode(png).decode()
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n / s <= 9)
    left, top = 44, 4
    image = (
        f'<image x="{left}" y="{top}" width="{size}" height="{size}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{uri}"/>'
    )
    body = [image]
    for k in range(0, n, step):
        at = (k + 0.5) * size / n
        body.append(_text(left + at, top + size + 14, str(k)))
        body.append(_text(left - 5, top + at + 4, str(k), "end"))
    body.append(_text(left + size / 2, top + size + 30, "expert j"))
    body.append(_text(11, top + size / 2, "expert i", "middle", f' transform="rotate(-90 11 {top + size / 2:.0f})"'))
    return _svg(left + size + 6, top + size + 38, body, "co-activation of experts")


def _round_up(value: float) -> float:
    """The next number whose quarters are short."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(unit * step for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if unit * step >= value * 0.999)


def lines(
    series: dict[str, Sequence[float | None]],
    labels: Sequence[str],
    *,
    y_title: str,
    low: float | None = 0.0,
    high: float | None = None,
    form: Callable[[float], str] = lambda v: f"{v:.2f}",
    x_title: str = "layer",
) -> str:
    """One line per series over the labels; gaps where a value is None. ``form`` writes the axis numbers."""
    known = [v for values in series.values() for v in values if v is not None]
    if not known:
        return "<p>No data.</p>"
    bottom = min(known) if low is None else low
    top_value = max(known) * 1.06 if high is None else high
    if high is None:
        top_value = _round_up(top_value)
    if top_value <= bottom:
        top_value = bottom + 1
    width, height, left, top = 440.0, 190.0, 76, 12
    n = len(labels)

    def x(i: int) -> float:
        return left + (width - 20) * ((i + 0.5) / n)

    def y(v: float) -> float:
        return top + height * (1 - (v - bottom) / (top_value - bottom))

    body = []
    for k in range(5):
        v = bottom + (top_value - bottom) * k / 4
        body.append(f'<line x1="{left}" x2="{left + width - 20}" y1="{y(v):.1f}" y2="{y(v):.1f}" class="grid"/>')
        body.append(_text(left - 6, y(v) + 4, form(v), "end"))
    body += [_text(x(i), top + height + 16, labels[i]) for i in range(0, n, max(1, math.ceil(n / 16)))]
    body.append(_text(left + width / 2, top + height + 33, x_title))
    body.append(_text(13, top + height / 2, y_title, "middle", f' transform="rotate(-90 13 {top + height / 2:.0f})"'))
    for (name, values), colour in zip(series.items(), SERIES, strict=False):
        points = [(x(i), y(v), v, labels[i]) for i, v in enumerate(values) if v is not None]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _, _ in points)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        body += [
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"><title>'
            f"{html.escape(name)}, {html.escape(x_title)} {html.escape(label)}: {html.escape(form(v))}</title></circle>"
            for a, b, v, label in points
        ]
    at = left
    for (name, _), colour in zip(series.items(), SERIES, strict=False):
        body.append(f'<rect x="{at}" y="{top + height + 44}" width="12" height="4" fill="{colour}"/>')
        body.append(_text(at + 17, top + height + 50, name, "start"))
        at += 34 + int(6.9 * len(name))
    return _svg(max(left + width, at), top + height + 60, body, y_title)


def bars(values: Sequence[Any], labels: Sequence[str], *, x_title: str, y_title: str) -> str:
    """Vertical bars with their share of the total above them."""
    total = sum(values) or 1
    highest = max(values, default=1) or 1
    width = max(26.0, min(60.0, 460 / max(1, len(values))))
    height, left, top = 150, 34, 20
    body = []
    for i, (v, label) in enumerate(zip(values, labels, strict=True)):
        tall = height * v / highest
        x = left + i * width
        body.append(
            f'<rect x="{x + 2:.1f}" y="{top + height - tall:.1f}" width="{width - 4:.1f}" height="{tall:.1f}" '
            f'fill="{SERIES[0]}"><title>{html.escape(label)}: {v}</title></rect>'
        )
        if v:
            body.append(_text(x + width / 2, top + height - tall - 4, f"{v / total:.0%}"))
        body.append(_text(x + width / 2, top + height + 15, label))
    body.append(_text(left, top + height + 33, x_title, "start"))
    body.append(_text(13, top + height / 2, y_title, "middle", f' transform="rotate(-90 13 {top + height // 2})"'))
    return _svg(left + max(len(values) * width, 7.0 * len(x_title)) + 8, top + height + 42, body, y_title)
