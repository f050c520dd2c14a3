"""The live view and the table: what stands on the screen for known counts, at any size, and nothing that misleads."""

import io
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from boards import FakeWorker
from rich.console import Console

from moe_monitor.cli.heatmap import Shape, bars, group_loads
from moe_monitor.cli.live import Tracker, View, screen
from moe_monitor.cli.main import main
from moe_monitor.snapshot import Status, read_engines


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_MONITOR_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("COLUMNS", "100")


def drawn(view, width, height, notes=("note",), others=0):
    """The screen as its lines; fails if it is larger than it may be."""
    file = io.StringIO()
    Console(file=file, width=width, height=height, force_terminal=True, color_system=None).print(
        screen(view, list(notes), others)
    )
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    assert len(lines) <= height
    return lines


def since_start(directory):
    (engine,) = read_engines(directory)
    return View(engine, engine.rows, None, 12.0)


def map_lines(lines):
    """The lines that begin with a layer's number."""
    return [line for line in lines if re.match(r" *\d+ [·▁-█]", line)]


def test_one_character_an_expert_says_its_load_over_the_mean():
    loads = np.array([0.0, 0.01, 0.5, 1.0, 2.0, 4.0, 9.0])
    (line,) = bars(loads, rows=1, cell=1)
    assert line.plain == "·▁▁▂▄██"


def test_tall_bars_stack():
    lines = [line.plain for line in bars(np.array([0.0, 1.0, 3.0, 4.0]), rows=4, cell=1)]
    assert lines == ["   █", "  ██", "  ██", "·███"]


def test_wide_bars_stay_apart():
    (line,) = bars(np.array([4.0, 0.0]), rows=1, cell=3)
    assert line.plain == "██ ·  "


def test_a_group_shows_its_hottest_expert():
    counts = np.array([[0, 0, 30, 0, 0, 10, 0], [0] * 7])  # mean 40/7; the last group has one expert
    grouped = group_loads(counts, 3)
    np.testing.assert_allclose(grouped, [[30 / (40 / 7), 10 / (40 / 7), 0], [0, 0, 0]])


@pytest.mark.parametrize("experts", [1, 7, 8, 60, 64, 128, 160, 256, 384])
@pytest.mark.parametrize("width", [20, 40, 76, 77, 116, 196, 400])
def test_the_map_fits_whatever_the_width(experts, width):
    shape = Shape.fit(experts, width, [6, 6, 8, 11, 5, 12], layers=16, height=20)
    taken = shape.map_width + sum([6, 6, 8, 11, 5, 12][: shape.columns])
    assert taken <= max(width, 20)
    assert shape.group * (shape.map_width // shape.cell) >= experts
    assert shape.columns >= 2


@pytest.mark.parametrize("layers", [1, 4, 16, 27, 58, 94])
@pytest.mark.parametrize("height", [1, 3, 10, 17, 33, 60])
def test_the_map_fits_whatever_the_height(layers, height):
    shape = Shape.fit(64, 100, [6, 6], layers, height)
    assert 1 <= shape.layers <= layers
    hidden = shape.layers < layers
    assert shape.layers * (shape.rows + shape.gap) + hidden <= max(2, height)


def test_olmoe_fits_a_terminal_of_80_by_24_whole(directory):
    with FakeWorker(directory, layers=tuple(range(16))):
        lines = drawn(since_start(directory), 80, 24)
    rows = map_lines(lines)
    assert [int(row.split()[0]) for row in rows] == list(range(16))
    assert all(len(row.split()[1]) == 64 for row in rows)
    assert "per column" not in "\n".join(lines)


def test_numbers_beside_the_map(directory):
    with FakeWorker(directory, layers=(3,), tokens=1000) as worker:
        counts = np.full(64, 100)
        counts[5], counts[9] = 1800, 0
        worker.rows[0, :64] = counts
        worker.publish(passes=7)
        lines = drawn(since_start(directory), 140, 24)
    numbers = map_lines(lines)[-1].split()[2:]
    # 8000 choices, mean 125; the floor for 1000 tokens, 64 experts, top-8 is 1.2 by simulation
    assert numbers == ["14.40", "1.20", "0.75", "#5", "22.5%", "1", "1,000"]
    assert "1,000 tokens" in lines[1]
    assert "since start" in lines[4]


def test_large_models_show_their_most_imbalanced_layers_in_order(directory):
    with FakeWorker(directory, layers=tuple(range(58)), experts=64, tokens=50) as worker:
        worker.rows[:, :64] = 100
        for layer in (7, 50):
            worker.rows[layer, 0] = 900 + layer
        worker.publish(passes=2)
        lines = drawn(since_start(directory), 80, 11)
    assert [int(row.split()[0]) for row in map_lines(lines)] == [7, 50]
    assert " 56 less imbalanced layers not shown" in lines


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (Status(active=False, reason="kernel bypasses the hook"), "not active: kernel bypasses the hook"),
        (Status(active=False, reason=""), "not active: no reason given"),
        (Status(active=True, capture="op", reason=""), "active (op)"),
    ],
)
def test_state_is_said(directory, status, words):
    with FakeWorker(directory) as worker:
        worker.status(status)
        assert words in drawn(since_start(directory), 100, 24)[1]


def test_a_silent_worker_is_said_and_not_called_active(directory):
    with FakeWorker(directory):
        (engine,) = read_engines(directory)
    engine.age = 99.0
    line = drawn(View(engine, engine.rows, None, 0.0), 100, 24)[1]
    assert "silent for 99 s" in line
    assert "active" not in line


def test_no_tokens_draws_no_map(directory):
    with FakeWorker(directory, tokens=0):
        lines = drawn(since_start(directory), 80, 24)
    assert not map_lines(lines)
    assert any("No token has been routed yet" in line for line in lines)


def test_a_model_without_moe_layers_is_said(directory):
    with FakeWorker(directory, layers=()):
        lines = drawn(since_start(directory), 80, 24)
    assert any("no mixture-of-experts layers" in line for line in lines)


def test_names_cannot_steer_the_terminal(directory):
    with FakeWorker(directory, model_name="\x1b[2Jevil\x9b\r[bold]"):
        lines = drawn(since_start(directory), 80, 24, notes=("\x1b]0;x\x07",))
    assert "?[2Jevil??[bold]" in lines[0]
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", "".join(lines))


def test_waiting_screen():
    lines = drawn(None, 80, 24, notes=("Boards: /nowhere",))
    assert any("Waiting for a monitored server" in line for line in lines)
    assert any("/nowhere" in line for line in lines)


def test_tracker_windows_and_rates(directory):
    with FakeWorker(directory, tokens=100) as worker:
        tracker = Tracker(window=10.0)

        def at(now):
            return tracker.update(read_engines(directory), now)[0]

        first = at(0.0)
        # What came before is not the window's, but is better than an empty map.
        assert (first.seconds, first.tokens_per_second) == (None, 0.0)
        assert first.rows[0].sum() == worker.rows[0].sum()
        before = worker.rows.copy()
        worker.rows = worker.rows * 3
        worker.publish(passes=3)
        second = at(4.0)
        assert second.seconds == 4.0
        assert second.tokens_per_second == 200 / 4
        np.testing.assert_array_equal(second.rows, worker.rows - before)
        for now in (5.0, 10.0, 15.0):
            at(now)
        late = at(20.0)
        assert late.tokens_per_second == 0.0
        assert late.seconds is None  # nothing in the last 10 s: since start again


def test_once_prints_every_engine(directory, capsys):
    with FakeWorker(directory, "a", model_name="one"), FakeWorker(directory, "b", model_name="two", engine="1"):
        assert main(["top", "--once"]) == 0
        both = capsys.readouterr().out
        assert main(["top", "--once", "--model", "tw", "--engine", "1"]) == 0
        two = capsys.readouterr().out
    assert "one  engine 0, 64 experts, top-8" in both
    assert "two  engine 1" in both
    assert "one" not in two
    rows = [line.split() for line in two.splitlines() if re.match(r" +\d+ +1,000 ", line)]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert "1,000 tokens in 1 forward passes" in two


def test_once_fits_80_columns(directory, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with FakeWorker(directory, tokens=5000):
        main(["top", "--once"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)


@pytest.mark.parametrize(("arguments", "words"), [([], "no monitored server is running"), (["--model", "x"], "tiny")])
def test_once_without_a_match_says_so(directory, capsys, arguments, words):
    worker = FakeWorker(directory) if arguments else None
    assert main(["top", "--once", *arguments]) == 1
    assert words in capsys.readouterr().err
    if worker:
        worker.board.close()


def test_bad_settings_are_one_plain_line(monkeypatch, capsys):
    monkeypatch.setenv("MOE_MONITOR_INTERVAL", "fast")
    assert main(["top", "--once"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("moe-monitor top: MOE_MONITOR_INTERVAL='fast' is not allowed")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["export", "--port", "70000"], ["top", "--interval", "-1"]])
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: moe-monitor" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_export_serves_until_told_to_stop(directory, number):
    with FakeWorker(directory, tokens=77):
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_monitor.cli.main", "export", "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        try:
            url = process.stdout.readline().split()[0]
            with urllib.request.urlopen(url, timeout=10) as answer:
                body = answer.read().decode()
            assert 'model_name="tiny-olmoe",engine="0",layer="2"} 77' in body
            started = time.monotonic()
            process.send_signal(number)
            assert process.wait(timeout=10) == 0
            assert time.monotonic() - started < 5
        finally:
            process.kill()
            process.communicate()


def test_export_on_a_taken_port_fails_plainly(directory, capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["export", "--port", str(taken.getsockname()[1])]) == 1
    assert "another program listens there" in capsys.readouterr().err


def test_broken_pipe_is_no_error(directory):
    with FakeWorker(directory):
        command = f"{sys.executable} -m moe_monitor.cli.main doctor --json | head -c 1"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{"
    assert done.stderr == ""


def test_doctor_json_has_no_surprises(directory, capsys):
    with FakeWorker(directory):
        main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    engine = next(check for check in report["checks"] if check["name"] == "tiny-olmoe engine 0")
    assert engine["status"] == "ok"
    assert engine["data"]["workers"] == 1
    assert engine["data"]["capture"] == "eager"
