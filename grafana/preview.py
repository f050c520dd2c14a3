"""Render the dashboards' panels from a Prometheus' answers to PNG, without Grafana: a preview, not a screenshot.

    python grafana/preview.py --url http://127.0.0.1:9090 --out DIR [--dashboard UID] [--var layer=7] [--hours 3]

Layout, titles, units, thresholds, colours and transformations are those of the JSON under grafana/dashboards/; what
Grafana itself adds (menus, hover, links) is not drawn. Needs matplotlib (the `test` extra).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True  # this folder is shipped as it lies

import preview_panels as panels  # noqa: E402  (after the line above)
from matplotlib.figure import Figure  # noqa: E402  (same)

DASHBOARDS = Path(__file__).parent / "dashboards"
GRID, HEAD = 0.36, 0.75  # inches of a grid unit's height, and of the page's head


class Source:
    """Asks Prometheus, with the dashboard's variables filled in, and keeps the time of every query."""

    def __init__(self, url: str, end: float, seconds: float) -> None:
        self.url, self.end, self.start = url.rstrip("/"), end, end - seconds
        self.variables: dict[str, str] = {}
        self.times: list[tuple[float, str]] = []

    def get(self, path: str, **parameters: Any) -> Any:
        query = urllib.parse.urlencode(parameters, doseq=True)
        began = time.perf_counter()
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=60) as answer:
            data = json.load(answer)["data"]
        self.times.append((time.perf_counter() - began, str(parameters.get("query", path))))
        return data

    def fill(self, text: str) -> str:
        """Variables as Grafana writes them into a regular expression or text."""
        for name, value in sorted(self.variables.items(), key=lambda item: -len(item[0])):
            text = text.replace(f"${{{name}}}", value).replace(f"${name}", value)
        return text

    def resolve(self, variables: list[dict[str, Any]], given: dict[str, str]) -> None:
        """Choose as Grafana does when a dashboard is opened: All where it can be, else the first value."""
        for variable in variables:
            name = variable["name"]
            if name in given:
                self.variables[name] = given[name]
            elif variable["type"] != "query":
                self.variables[name] = variable["type"]
            elif variable.get("includeAll"):
                self.variables[name] = str(variable.get("allValue") or ".*")
            else:
                selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"], re.DOTALL).groups()  # type: ignore[union-attr]
                span = {"start": self.start, "end": self.end}
                found = self.get(f"label/{label}/values", **{"match[]": self.fill(selector)}, **span)
                found.sort(key=lambda v: (0, int(v), "") if v.isdecimal() else (1, 0, v))
                self.variables[name] = found[0] if found else ""

    def answer(self, target: dict[str, Any], points: int = 240) -> list[dict[str, Any]]:
        """Series: ``metric`` (labels), ``name`` (legend), ``values`` [(time, value)]."""
        expr = self.fill(target["expr"])
        if target.get("instant"):
            found = self.get("query", query=expr, time=self.end)["result"]
            found = [{"metric": s["metric"], "values": [s["value"]]} for s in found if "value" in s]
        else:
            step = max(15.0, (self.end - self.start) / points)
            span = {"start": self.start, "end": self.end, "step": step}
            found = self.get("query_range", query=expr, **span)["result"]
        for series in found:
            series["values"] = [(float(at), float(value)) for at, value in series["values"]]
            series["name"] = self._legend(target.get("legendFormat", ""), series["metric"])
        return list(found)

    def _legend(self, text: str, metric: dict[str, str]) -> str:
        if not text or text == "__auto":
            own = {k: v for k, v in metric.items() if k != "__name__"}
            return ", ".join(own.values()) or metric.get("__name__", "value")
        return re.sub(r"{{\s*(\w+)\s*}}", lambda m: metric.get(m[1], ""), text)


def annotations(source: Source, dashboard: dict[str, Any]) -> list[tuple[float, str]]:
    """When each alert began to fire."""
    found = []
    for annotation in dashboard.get("annotations", {}).get("list", []):
        if "expr" in annotation:
            firing = source.answer({"expr": annotation["expr"], "legendFormat": annotation["titleFormat"]})
            found += [(series["values"][0][0], series["name"]) for series in firing]
    return found


def render(path: Path, source: Source, given: dict[str, str], out: Path) -> list[str]:
    """Draw one dashboard; returns the titles of panels without data."""
    dashboard = json.loads(path.read_text())
    source.variables.clear()
    source.resolve(dashboard["templating"]["list"], given)
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in dashboard["panels"])
    width, height = 16.0, rows * GRID + HEAD
    figure = Figure(figsize=(width, height), dpi=90, facecolor=panels.PAGE)
    chosen = {k: "All" if v == ".*" else v for k, v in source.variables.items() if k not in ("datasource", "traces")}
    title = f"{dashboard['title']}    " + "   ".join(f"{k}: {v}" for k, v in chosen.items())
    figure.text(0.008, 1 - 0.3 / height, title, color=panels.TEXT, fontsize=12, weight="bold", va="center")
    note = "preview drawn by grafana/preview.py from a Prometheus' answers, not a Grafana screenshot"
    figure.text(0.992, 1 - 0.6 / height, note, color=panels.DIM, fontsize=8, va="center", ha="right")
    marks = annotations(source, dashboard)
    empty = []
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        top = height - HEAD - grid["y"] * GRID
        box = (grid["x"] / 24, (top - grid["h"] * GRID) / height, grid["w"] / 24, grid["h"] * GRID / height)
        panel["title"] = source.fill(panel.get("title", ""))
        answers = [source.answer(target, panel.get("maxDataPoints", 240)) for target in panel.get("targets", [])]
        frame = panels.Frame(figure, box, panel, answers, (source.start, source.end), marks)
        if not panels.draw(frame):
            empty.append(panel["title"])
    save(figure, out)
    return empty


def save(figure: Figure, out: Path) -> None:
    """As a PNG of 256 colours: a third of the size."""
    from PIL import Image

    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, facecolor=panels.PAGE)
    with Image.open(out) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", required=True, help="base URL of a Prometheus")
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNGs")
    parser.add_argument("--dashboard", action="append", help="uid; default: all")
    parser.add_argument("--var", action="append", default=[], metavar="NAME=VALUE", help="value of a variable")
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--end", type=float, default=None, help="Unix time of the right edge; default: now")
    arguments = parser.parse_args()
    given = dict(text.split("=", 1) for text in arguments.var)
    source = Source(arguments.url, arguments.end or time.time(), arguments.hours * 3600)
    for path in sorted(DASHBOARDS.glob("*.json")):
        if arguments.dashboard and path.stem not in arguments.dashboard:
            continue
        empty = render(path, source, given, arguments.out / f"{path.stem}.png")
        print(f"{path.stem}: " + (f"without data: {', '.join(empty)}" if empty else "every panel has data"))
    slowest, query = max(source.times)
    print(f"{len(source.times)} queries, slowest {slowest * 1000:.0f} ms: {' '.join(query.split())[:150]}")


if __name__ == "__main__":
    main()
