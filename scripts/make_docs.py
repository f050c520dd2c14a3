#!/usr/bin/env python3
"""Write docs/metrics.md and docs/settings.md from the catalogue and the knobs; ``--check`` only says what is stale."""

from __future__ import annotations

import sys
from pathlib import Path

from moe_monitor.catalog import IDENTITY, METRICS, WINDOWS
from moe_monitor.settings import KNOBS

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTE = "<!-- made by scripts/make_docs.py from {source}; do not edit -->\n\n"


def metrics() -> str:
    lines = [
        NOTE.format(source="moe_monitor/catalog.py") + "# Metrics\n",
        f"Every metric carries the labels `{'`, `'.join(IDENTITY)}` with vLLM's own meaning; the stand-alone exporter",
        "adds `server`, because several servers of a node may serve one model. Windows are trailing: "
        + ", ".join(f"`{name}` is {seconds:.0f} s" for name, seconds in WINDOWS.items())
        + ".",
        "A window without tokens has no balance and therefore no series. No label ever holds a request id.\n",
        "| metric | kind | unit | labels | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for m in METRICS:
        labels = ", ".join(f"`{label}`" for label in m.labels)
        lines.append(f"| `{m.name}` | {m.kind} | {m.unit} | {labels} | {m.help} |")
    lines += ["\n## Buckets\n", "Upper bounds, inclusive; Prometheus adds +Inf.\n"]
    lines += ["| histogram | bounds |", "| --- | --- |"]
    lines += [f"| `{m.name}` | {', '.join(f'{b:g}' for b in m.buckets)} |" for m in METRICS if m.buckets]
    return "\n".join(lines) + "\n"


def settings() -> str:
    lines = [
        NOTE.format(source="moe_monitor/settings.py") + "# Settings\n",
        "All settings are environment variables of the server. A bad value or an unknown `MOE_MONITOR_*` name is said",
        "in one log line that names the value and the allowed range; the server starts with the monitor off.\n",
        "| variable | default | allowed | meaning |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| `{k.env}` | {f'`{k.default}`' if k.default else ''} | {k.allowed} | {k.meaning} |" for k in KNOBS]
    return "\n".join(lines) + "\n"


PAGES = {"metrics.md": metrics, "settings.md": settings}


def main() -> int:
    stale = []
    for name, make in PAGES.items():
        path = DOCS / name
        if path.exists() and path.read_text() == make():
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            path.write_text(make())
    if stale and "--check" in sys.argv:
        print("stale: " + ", ".join(stale) + "; run scripts/make_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
