"""Offline ``LLM(...)``: compiled and eager, the compile cache shared by runs with and without the monitor, faults."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from oracle import Oracle
from serving import environment

pytestmark = pytest.mark.vllm


def run(model: Path, mode: str, run_dir: Path, *plant: Path, **env: str) -> dict[str, Any]:
    script = Path(__file__).parent / "offline.py"
    command = [sys.executable, str(script), str(model), mode, *map(str, plant)]
    done = subprocess.run(command, env=environment(run_dir, **env), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["log"] = done.stdout + done.stderr
    return result


def check_exact(result: dict[str, Any], oracle: Oracle) -> None:
    """Both rounds: all but the last token of each sequence; in the second, whole cached blocks of 128 are skipped."""
    counts = np.zeros((oracle.layers, oracle.experts), dtype=np.int64)
    for number, outputs in enumerate(result["rounds"]):
        for prompt, output in zip(result["prompts"], outputs, strict=True):
            ids = oracle.routing(prompt + output).ids[:-1]
            cached = (len(prompt) - 1) // 128 * 128 if number else 0
            counts += oracle.counts(ids[cached:])
    (engine,) = result["engines"]
    # A tie may move one token from one expert to another: two counts. The seeds are such that there are next to none.
    assert oracle.ties <= 2
    assert np.abs(np.array(engine["counts"]) - counts).sum() <= 2 * len(result["rounds"]) * oracle.ties
    assert engine["status"]["active"] and not engine["status"]["errors"]


#: Mode, whether the monitor is on, and of how many passes one is timed; over one compile cache, in this order.
RUNS = {
    "on": ("compiled", "1", "10"),
    "off": ("compiled", "0", "10"),
    "again": ("compiled", "1", "10"),
    "untimed": ("compiled", "1", "0"),
    "eager": ("eager", "1", "10"),
}


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> Oracle:
    """One for all runs: it counts ties."""
    return Oracle(tiny_model)


@pytest.fixture(scope="module")
def result(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Of the run of that name, which is made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def made(name: str) -> dict[str, Any]:
        mode, enabled, every = RUNS[name]
        env = {"MOE_MONITOR_ENABLED": enabled, "MOE_MONITOR_LATENCY_EVERY": every}
        return run(tiny_model, mode, folder / f"run-{name}", VLLM_CACHE_ROOT=str(folder / "cache"), **env)

    return made


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_exact_with_the_monitor_and_has_nothing_of_it_without(name: str, oracle: Oracle, result: Any) -> None:
    found = result(name)
    if name == "off":
        assert found["engines"] == []
        assert found["modules"] == [
            "moe_monitor.capture",
            "moe_monitor.capture.vllm",
            "moe_monitor.capture.vllm.plugin",
        ]
        return
    check_exact(found, oracle)
    (engine,) = found["engines"]
    if name == "untimed":
        assert engine["timed"] is None
    else:
        timed = np.array(engine["timed"])
        assert timed.shape == (4, 3) and timed.min() == timed.max() >= 1, "every stage of every layer alike"


def test_compiled_and_eager_agree_over_a_shared_compile_cache(result: Any) -> None:
    """On, off, on, and on without timing, over one cache folder: the same tokens."""
    assert len({json.dumps(result(name)["rounds"]) for name in RUNS}) == 1
    assert "compil" in result("on")["log"].lower()


@pytest.mark.parametrize("where", ["meter", "publish"])
def test_a_failing_hook_switches_only_the_monitor_off(tiny_model: Path, tmp_path: Path, where: str) -> None:
    """While attaching it is the device's memory that is full: on CPUs there is none, so the meter's set-up says so."""
    plant = tmp_path / where
    if where == "meter":
        plant.write_text("oom")
    result = run(tiny_model, "eager", tmp_path / "run", plant, MOE_TEST_FAULT=f"{where}:{plant}")
    assert result["rounds"][0] == result["rounds"][1]
    assert result["log"].count("moe-monitor switched itself off") == 1
    assert f"planted in {where}" in result["log"]
    if where == "meter":
        assert "OutOfMemoryError" in result["log"]
        (engine,) = result["engines"]
        assert not engine["status"]["active"]
        assert engine["status"]["errors"] == {"attach": 1}
    else:
        assert result["engines"] == []  # a board that cannot be written is taken away: no stale numbers


def test_a_dense_model_is_left_alone(tmp_path: Path) -> None:
    result = run(models.dense(tmp_path / "dense"), "eager", tmp_path / "run")
    assert result["log"].count("moe-monitor is inactive: the model has no mixture-of-experts layers") == 1
    (engine,) = result["engines"]
    assert not engine["status"]["active"] and not engine["status"]["errors"]
    assert engine["identity"]["layers"] == []
