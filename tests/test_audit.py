"""scripts/audit.py: what is looked up, and that what cannot be looked up is not taken for clean."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "audit.py"

#: Stands for pip in the temporary environment: a report of three packages, and no network.
PYTHON = """#!{python}
import json, sys
if "--report" in sys.argv:
    install = [{{"metadata": {{"name": n, "version": v}}}}
               for n, v in (("torch", "2.13.0+cpu"), ("numpy", "2.3.5"), ("moe-monitor", "0.1.0"))]
    open(sys.argv[sys.argv.index("--report") + 1], "w").write(json.dumps({{"install": install}}))
elif "pip_audit" in sys.argv:
    open({log!r}, "w").write(json.dumps([sys.argv[1:], open(sys.argv[-1]).read()]))
    sys.exit({code})
"""


@pytest.fixture
def audit(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    log = tmp_path / "asked.json"

    def run(code, *arguments):
        def create(folder, **_):
            python = folder / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.write_text(PYTHON.format(python=sys.executable, log=str(log), code=code))
            os.chmod(python, 0o700)

        monkeypatch.setattr(module.venv, "create", create)
        monkeypatch.setattr(sys, "argv", ["audit.py", *arguments])
        return module.main(), json.loads(log.read_text())

    return run


def test_all_that_would_be_installed_is_looked_up(audit, capsys):
    code, (command, requirements) = audit(0)
    assert code == 0
    assert requirements.split() == ["numpy==2.3.5", "torch==2.13.0"]
    assert "--strict" in command, "what is skipped fails"
    assert command[command.index("--vulnerability-service") + 1] == "pypi"
    assert "all 2 packages looked up with pypi, no known vulnerability" in capsys.readouterr().out


def test_what_could_not_be_looked_up_is_not_clean(audit, capsys):
    code, _ = audit(1, "--service", "osv")
    assert code == 1
    shown = capsys.readouterr().out
    assert "not clean, or not all of the 2 packages could be looked up" in shown
    assert "no known vulnerability" not in shown
