"""The wheel in an environment of its own, without torch and vLLM: what is in it, and that its commands work there."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from boards import FakeWorker

from moe_monitor.layout import RowLayout

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, timeout=300)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """The installed moe-monitor. Its environment has what the wheel asks for and nothing else."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run([*PIP, "--python", str(python), "install", "--quiet", str(wheel)], check=True, timeout=280)
    missing = (
        "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) for m in ('torch', 'vllm', 'transformers')))"
    )
    subprocess.run([python, "-c", missing], check=True)
    return folder / "bin" / "moe-monitor"


@pytest.fixture
def environment(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MOE_MONITOR_", "VLLM_"))}
    return kept | {"MOE_MONITOR_DIR": str(tmp_path / "run"), "COLUMNS": "100"}


def test_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "moe_monitor").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assets = {f"moe_monitor/{path.relative_to(ROOT)}" for path in (ROOT / "grafana").rglob("*") if path.is_file()}
    assets |= {f"moe_monitor/grafana/runbooks/{path.name}" for path in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert "moe_monitor/py.typed" in sources
    assert assets
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == sources | assets
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_metadata(metadata):
    from moe_monitor import __version__

    assert (metadata["Name"], metadata["Version"]) == ("moe-monitor", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = {line.split(">")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert needed == {"numpy", "prometheus-client", "rich"}
    assert set(metadata.get_all("Provides-Extra")) >= {"otel", "web", "transformers", "test", "dev"}


def test_entry_points(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        text = archive.read(name).decode()
    assert "[console_scripts]\nmoe-monitor = moe_monitor.cli.main:main\n" in text
    assert "[vllm.general_plugins]\nmoe_monitor = moe_monitor.capture.vllm.plugin:register\n" in text


@contextlib.contextmanager
def routing(worker):
    """The worker routes all the time, as one must for a baseline to be recorded."""
    stopped, added = threading.Event(), worker.rows.copy()

    def route():
        passes = 1
        while not stopped.wait(0.05):
            passes += 1
            worker.rows = worker.rows + added
            worker.publish(passes)

    thread = threading.Thread(target=route)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


@pytest.mark.slow
def test_types_reach_whoever_installs_it(command, tmp_path):
    """mypy, as a user would run it, finds the installed package's types; without py.typed it would refuse."""
    user = "from moe_monitor.statistics import imbalance_floor\nx: str = imbalance_floor(64, 64, 8)\n"
    (tmp_path / "user.py").write_text(user)
    python = command.parent / "python"
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "user.py"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(mypy, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert "py.typed" not in done.stdout
    assert 'expression has type "float", variable has type "str"' in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_commands_without_torch_and_vllm(command, environment, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [command, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
        )

    assert run("--version").stdout.startswith("moe-monitor ")
    nothing = run("top", "--once")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "no monitored server is running" in nothing.stderr

    with FakeWorker(tmp_path / "run", tokens=4321) as worker:
        shown = run("top", "--once")
        assert shown.returncode == 0, shown.stderr
        assert "4,321 tokens" in shown.stdout

        doctor = run("doctor", "--json")
        assert doctor.returncode == 0, doctor.stdout
        found = {check["name"]: check for check in json.loads(doctor.stdout)["checks"]}
        assert found["vLLM"]["detail"] == "not installed in this environment"
        assert found["plugin"]["status"] == "ok"
        assert found["tiny-olmoe engine 0"]["status"] == "ok"

        record = ("baseline", "record", "--window", "1", "--duration", "4", "normal.json")
        with routing(worker):
            recorded = run(*record)
        assert recorded.returncode == 0, recorded.stderr
        shown = run("baseline", "show", "normal.json")
        assert shown.returncode == 0, shown.stderr
        assert "tiny-olmoe" in shown.stdout

        written = run("dashboards", "--out", "assets")
        assert written.returncode == 0, written.stderr
        made = {path.name for path in (tmp_path / "assets").rglob("*") if path.is_file()}
        assert made >= {path.name for path in (ROOT / "grafana").rglob("*.json")}

        demo = run("demo")
        assert demo.returncode == 1
        assert "vLLM is not installed" in demo.stderr

        exporter = subprocess.Popen(
            [command, "export", "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        )
        try:
            url = exporter.stdout.readline().split()[0]
            with urllib.request.urlopen(url, timeout=10) as answer:
                text = answer.read()
                tokens = int(worker.rows[0, RowLayout(64).at("tokens")])
                assert b'model_name="tiny-olmoe",engine="0",layer="0"} %d\n' % tokens in text
            exporter.send_signal(signal.SIGTERM)
            assert exporter.wait(timeout=10) == 0
        finally:
            exporter.kill()
            exporter.communicate()
