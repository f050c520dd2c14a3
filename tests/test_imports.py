"""Imports go one way, and what vLLM loads in every process is light."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"]

HEAVY = ["torch", "vllm", "transformers", "numpy", "prometheus_client", "rich", "opentelemetry", "triton"]


def lint(folder):
    done = subprocess.run(
        [*LINT, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def test_import_contracts_are_kept():
    code, output = lint(ROOT)
    assert code == 0, output
    assert "0 broken" in output


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("layout.py", "import moe_monitor.board", "Foundations import nothing of ours"),
        ("snapshot.py", "import moe_monitor.export.windows", "The board knows neither"),
        ("export/windows.py", "import torch", "Export runs where people look"),
        ("export/windows.py", "import moe_monitor.capture.meter", "Export runs where people look"),
        ("capture/meter.py", "import moe_monitor.export.windows", "Capture does not export"),
        ("capture/meter.py", "import vllm", "Only capture.vllm imports vLLM"),
        ("cli/top.py", "import transformers", "Only capture.transformers imports transformers"),
        ("cli/top.py", "import torch", "Only capture imports torch"),
    ],
)
def test_a_wrong_import_is_caught(tmp_path, module, line, contract):
    shutil.copytree(ROOT / "moe_monitor", tmp_path / "moe_monitor", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "moe_monitor" / module).open("a") as file:
        file.write(f"\n{line}\n")
    code, output = lint(tmp_path)
    assert code != 0
    # The report breaks long lines.
    assert re.search(rf"{contract}[^.]*? BROKEN", " ".join(output.split())), output


def loaded(statements):
    """Which heavy packages the statements load in a fresh process, and how long they take."""
    code = f"""
import sys, time
started = time.perf_counter()
{statements}
took = time.perf_counter() - started
print(f"{{took:.3f}}", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    took, *names = done.stdout.split()
    return float(took), names


def test_the_check_for_heavy_imports_sees_them():
    assert loaded("import moe_monitor.layout")[1] == ["numpy"]


@pytest.mark.parametrize(
    "statements",
    [
        "import moe_monitor.capture.vllm.plugin",
        "import moe_monitor.capture.vllm.plugin as p; p.register()",
        "import moe_monitor.cli.main",
        "import moe_monitor.capture.vllm.versions",
    ],
)
def test_what_must_be_light_is_light(statements):
    took, names = loaded(statements)
    print(f"{statements}: {took * 1000:.0f} ms")
    assert names == []
    assert took < 0.5


ENTRY = """
import sys, time
before = set(sys.modules)
started = time.process_time()
import moe_monitor.capture.vllm.plugin as plugin
plugin.register()
print(time.process_time() - started, *sorted(set(sys.modules) - before))
"""


def test_the_plugin_costs_a_process_next_to_nothing():
    """A bare interpreter, which has not even logging; in processor time, so that nothing else counts.

    The best of several runs: the first may have to compile. What is loaded says more than any clock.
    """
    runs = [
        subprocess.run([sys.executable, "-c", ENTRY], capture_output=True, text=True, check=True, timeout=60)
        for _ in range(7)
    ]
    took = [float(run.stdout.split()[0]) for run in runs]
    print(f"{1000 * min(took):.1f} ms")
    for run in runs:
        names = set(run.stdout.split()[1:])
        assert "moe_monitor.capture.vllm.plugin" in names
        assert names <= {"__future__", "moe_monitor", *(name for name in names if name.startswith("moe_monitor."))}
        assert not names & {"torch", "numpy", "asyncio", "wrapt", "logging", "typing"}
    assert min(took) < 0.020
