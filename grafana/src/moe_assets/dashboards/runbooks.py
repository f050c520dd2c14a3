"""7 Runbooks: those of docs/runbooks/, where whoever looks at a firing alert already is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_assets.alerts import ALERTS
from moe_assets.frame import dashboard
from moe_assets.panels import Row, assemble, words

UID = "moe-monitor-runbooks"
FOLDER = Path(__file__).resolve().parents[4] / "docs" / "runbooks"

#: Characters of a line in a panel of half the width, and lines of text in a grid unit. What is too high scrolls.
_WIDE, _LINES_A_UNIT = 105, 1.7


def _content(name: str) -> str:
    """Without the title, which is the panel's; headings one size smaller."""
    text = (FOLDER / f"{name}.md").read_text()
    return text.split("\n", 2)[2].replace("## ", "#### ")


def _height(content: str) -> int:
    paragraphs = [" ".join(part.split()) for part in content.split("\n\n")]
    lines = sum(
        1 + len(text) // _WIDE + text.count(" - ") + (text[:1].isdigit() and text.count(". ")) for text in paragraphs
    )
    return int((lines + 0.7 * len(paragraphs)) / _LINES_A_UNIT) + 2


def build() -> dict[str, Any]:
    order = sorted(ALERTS, key=lambda a: (("critical", "warning", "info").index(a.severity), a.name))
    contents = [(alert.name, _content(alert.name)) for alert in order]
    rows = [
        Row("", max(_height(text) for _, text in pair), [(words(name, text), 12) for name, text in pair])
        for pair in (contents[i : i + 2] for i in range(0, len(contents), 2))
    ]
    about = "What each alert means and what to do: meaning, impact, check, act, false positives. Critical ones first."
    return assemble(dashboard(UID, about), rows)
