"""benchmarks/gpu/check.py without a GPU: what it takes for right, on what real runs told, and how it ends."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from serving import eventually

ROOT = Path(__file__).resolve().parent.parent
#: An H100, 2026-11-26.
OUTPUT = (ROOT / "benchmarks/results/h100_2026-11-26d/exact.txt").read_text()


@pytest.fixture(scope="module")
def check() -> ModuleType:
    path = ROOT / "benchmarks" / "gpu" / "check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["gpu_check"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(tag: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(tag)) for line in OUTPUT.splitlines() if line.startswith(tag + " ")]


def test_what_real_runs_told_is_right(check: ModuleType) -> None:
    results, requests = told("RESULT"), told("REQUESTS")
    assert len(results) == len(requests) == 2
    assert [check.of_counts(result) for result in results] == [[], []]
    assert [check.of_requests(result) for result in requests] == [[], []]
    line = next(line for line in OUTPUT.splitlines() if "58 passed" in line)
    assert check.of_tests(line) == []
    assert check.of_tests("58 passed, 1 skipped, 2 warnings in 3.0s") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"active": False, "reason": "record: ValueError"}, "switched off: record: ValueError"),
        ({"errors": {"record": 1}}, "errors"),
        ({"sealed": 17}, "17 of 18 graphs"),
        ({"capture": "ingraph"}, "captured by ingraph, not by retain"),
        ({"graphs": 0, "sealed": 0}, "0 of 0 graphs"),
        ({"begun": 250}, "251 launches were posted, 250 have begun"),
        ({"posted": None, "begun": None}, "None launches were posted"),
        ({"tokens": 49275}, "49275 tokens, the shadow has 49276"),
        ({"largest_difference": {"experts": 1}}, "experts differs by 1"),
        ({"largest_difference": {"tokens": 1}}, "tokens differs by 1"),
        ({"largest_difference": {"nonfinite": 1}}, "nonfinite differs by 1"),
        ({"largest_difference": {"entropy": 3}}, "entropy differs by 3"),
        ({"largest_difference": {"mass_sum": 1600}}, "mass_sum differs by 1600"),
    ],
)
def test_one_wrong_number_is_seen(check: ModuleType, change: dict[str, Any], words: str) -> None:
    (wrong,) = check.of_counts({**told("RESULT")[0], **change})
    assert words in wrong


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ok": False}, "not ok"),
        ({"records": 143}, "143 records of 144"),
        ({"sealed": [15, 16]}, "15 of 16 graphs"),
        ({"errors": {"requests": 2}}, "errors"),
    ],
)
def test_one_wrong_request_is_seen(check: ModuleType, change: dict[str, Any], words: str) -> None:
    (wrong,) = check.of_requests({**told("REQUESTS")[0], **change})
    assert words in wrong


@pytest.mark.parametrize(
    "line", ["57 passed, 1 failed in 3s", "5 passed, 1 error in 2.0s", "1 passed, 57 skipped in 1.0s", ""]
)
def test_tests_that_did_not_pass_are_seen(check: ModuleType, line: str) -> None:
    assert check.of_tests(line)


def test_runs_are_judged_by_what_they_told_and_none_outlives_it(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = next(line for line in OUTPUT.splitlines() if line.startswith("RESULT "))
    child = tmp_path / "child"
    other = tmp_path / "other"
    lasts = f"{sys.executable} -c 'import os, signal, time; signal.signal(15, signal.SIG_IGN); "
    lasts += "print(os.getpid(), flush=True); time.sleep(600)'"
    hangs = f"import subprocess; subprocess.run({f'{lasts} > {child}'!r}, shell=True)"
    left = f"{lasts} > {other} & while [ ! -s {other} ]; do sleep 0.1; done"
    commands = {
        "good": f"print({good!r})",
        "silent": "print('CUDA error: out of memory'); raise SystemExit(3)",
        "told-then-failed": f"print({good!r}); raise SystemExit(1)",
        "hangs": hangs,
        "leaves-a-child": f"import subprocess; subprocess.run({left!r}, shell=True)",
    }
    runs = {name: check.Run(["-c", code], check.of_counts, "RESULT") for name, code in commands.items()}
    monkeypatch.setattr(check, "RUNS", runs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(check.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["check.py", "--limit-s", "15", "--keep", str(tmp_path / "kept")])
    began = time.monotonic()
    assert check.main() == 1
    assert time.monotonic() - began < 60
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line.split()[2]: line.split()[3] for line in lines if line.split()[1:2] == ["s"]}
    assert verdicts == {
        "good": "right",
        "silent": "WRONG",
        "told-then-failed": "WRONG",
        "hangs": "WRONG",
        "leaves-a-child": "WRONG",
    }
    assert any("ended with 3, told nothing; at last: CUDA error: out of memory" in line for line in lines)
    assert lines[-1] == "4 of 5 wrong"
    assert (tmp_path / "kept" / "good.txt").read_text().startswith("RESULT")
    for file in (child, other):
        eventually(lambda file=file: ended(int(file.read_text())), 10)


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
