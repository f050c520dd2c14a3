"""promtool's unit tests from Python: rules and time series in, firing alerts out."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
RULES = sorted((ROOT / "grafana" / "rules").glob("*.yml"))


def tool(name: str) -> str:
    """A program of Debian's prometheus or prometheus-alertmanager package."""
    path = shutil.which(name)
    if path is None:
        package = "prometheus-alertmanager" if name in ("prometheus-alertmanager", "amtool") else "prometheus"
        pytest.fail(f"{name} is not installed; on Debian: apt-get install {package}")
    return path


def labels(text: dict[str, str]) -> str:
    return "{" + ",".join(f'{k}="{v}"' for k, v in text.items()) + "}"


def run(folder: Path, tests: list[dict[str, Any]], *, interval: str = "30s") -> None:
    """``promtool test rules``; fails with what promtool says."""
    path = folder / "test.yml"
    data = {"rule_files": [str(p) for p in RULES], "evaluation_interval": "30s", "tests": []}
    data["tests"] = [{"interval": interval} | test for test in tests]
    path.write_text(yaml.safe_dump(data, sort_keys=False, width=10_000))
    done = subprocess.run([tool("promtool"), "test", "rules", str(path)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.fail((done.stdout + done.stderr)[-6000:])


def firing(at: str, *names: str) -> dict[str, Any]:
    """A promql_expr_test: exactly these alerts fire at that time."""
    samples = [{"labels": labels({"alertname": name}), "value": 1} for name in sorted(names)]
    return {
        "expr": 'max by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": at,
        "exp_samples": samples,
    }


def fires(at: str, name: str, *, firing: bool) -> dict[str, Any]:
    """A promql_expr_test: this alert fires then, or does not; others may."""
    samples = [{"labels": labels({"alertname": name}), "value": 1}] if firing else []
    return {
        "expr": f'max by (alertname) (ALERTS{{alertstate="firing",alertname="{name}"}})',
        "eval_time": at,
        "exp_samples": samples,
    }
