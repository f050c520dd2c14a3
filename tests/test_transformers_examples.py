"""The examples run as they stand, and say what is true of their toy model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other are slow on a busy machine
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, env=one)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_compare_example(tmp_path) -> None:
    said = run("transformers_compare.py", "--bits", "4", cwd=tmp_path)
    assert re.search(r"Two texts: different: \d of 4 layers differ", said)
    agreement = float(re.search(r"experts agree to ([\d.]+)%", said)[1])
    assert 12.5 < agreement < 100  # quantisation moves some tokens, and far fewer than chance would
    assert "<svg" in (tmp_path / "routing.html").read_text()
    (tmp_path / "a.txt").write_text("x")
    command = [sys.executable, str(EXAMPLES / "transformers_compare.py"), "--text", str(tmp_path / "a.txt")]
    assert "give --text twice" in subprocess.run(command, capture_output=True, text=True).stderr


def test_walkthrough_example(tmp_path) -> None:
    said = run("transformers_walkthrough.py", cwd=tmp_path)
    assert "one text against itself: no difference beyond sampling noise" in said
    assert re.search(r"layer 3: 80 % of the mass needs", said)
