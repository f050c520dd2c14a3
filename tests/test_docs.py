"""Generated pages are fresh, and README says only what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from moe_monitor.catalog import BY_NAME
from moe_monitor.settings import KNOBS

ROOT = Path(__file__).parents[1]


def test_generated_pages_are_fresh() -> None:
    done = subprocess.run([sys.executable, "scripts/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_documents_name_only_metrics_settings_and_files_that_exist() -> None:
    known = set(BY_NAME) | {f"{name}{suffix}" for name in BY_NAME for suffix in ("_bucket", "_count", "_sum")}
    settings = {knob.env for knob in KNOBS}
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = page.read_text()
        named = set(
            re.findall(r"\bmoe_(?!monitor\.|monitor/)[a-z0-9_]+_(?:total|ratio|bits|seconds|experts|info)\b", text)
        )
        assert named <= known, page
        assert set(re.findall(r"\bMOE_MONITOR_[A-Z_]+\b", text)) <= settings, page
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
