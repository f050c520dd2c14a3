"""A long stretch of load on a real server, only where its variable is set; the short form is in test_vllm_faults.py.

MOE_TEST_SOAK_MINUTES=60  for so long. MOE_TEST_SOAK_OUT=FILE: where the report is written.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MINUTES = float(os.environ.get("MOE_TEST_SOAK_MINUTES", "0"))
#: What a worker and an engine of vLLM 0.32 on a CPU keep of every request without the monitor, in KiB (0.49 and 0.47 in
#: benchmarks/results/soak_hour_without_monitor.json), and what a worker adds besides while it is young (21 MiB in
#: soak_without_monitor.json).
OF_VLLM, YOUNG = 0.5, 24 << 10


def benchmark() -> Any:
    """benchmarks/soak.py; benchmarks are scripts, not a package."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "soak.py"
    spec = importlib.util.spec_from_file_location("benchmark_soak", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(MINUTES * 60 + 900)
@pytest.mark.skipif(not MINUTES, reason="opt-in: MOE_TEST_SOAK_MINUTES=60")
def test_a_long_load_is_exact_and_leaves_every_process_as_large_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    """Counts are compared within: every token, against transformers."""
    report = benchmark().soak(tmp_path, tiny_model, MINUTES * 60, clients=3, every=5, enabled=True)
    if os.environ.get("MOE_TEST_SOAK_OUT"):
        Path(os.environ["MOE_TEST_SOAK_OUT"]).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    assert report["tokens_counted"] == report["tokens_computed"] > 0
    processes = {role: found for role, found in report.items() if isinstance(found, dict)}
    assert {"api_server", "engine", "exporter"} < set(processes)
    for role, found in processes.items():
        allowed = 16 << 10
        if "Worker" in role or role == "engine":
            allowed = YOUNG + int(report["requests"] * 2 / 3 * (OF_VLLM + 0.5))
        later = {name: values["at_end"] - values["after_a_third"] for name, values in found.items()}
        assert later["rss_kib"] <= allowed, role
        assert later["threads"] <= 0, role
        assert later["descriptors"] <= 2, role
