"""The alerts on traffic that routes as OLMoE does by its published counts: healthy, of another text, and broken.

Counters grow by drawn windows on a simulated clock; the real collector turns them into metrics, promtool evaluates the
shipped rules over them.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import promtool
import published
import pytest

from moe_monitor import baseline
from moe_monitor.export import drift as drift_module
from moe_monitor.export import windows as windows_module
from moe_monitor.export.drift import BaselineFile
from moe_monitor.export.families import families
from moe_monitor.export.windows import History
from moe_monitor.snapshot import EngineSnapshot, Status

STEP = 30  # seconds between scrapes
TOKENS = 2_000  # routed between two scrapes: 67 tokens a second
CHANGE = 15  # minutes after which traffic changes
END = 45
LABELS = {"job": "vllm", "instance": "a:8000", "model_name": "olmoe", "engine": "0"}

#: Read by rules; the rest would only make promtool slower.
USED = {
    "moe_router_entropy_ratio",
    "moe_router_selected_mass_ratio",
    "moe_nonfinite_tokens_total",
    "moe_routing_drift_bits",
    "moe_routing_drift_limit_bits",
    "moe_load_imbalance_ratio",
    "moe_load_imbalance_limit_ratio",
    "moe_load_cv_ratio",
    "moe_load_cv_limit_ratio",
    "moe_silent_experts",
    "moe_baseline_router_entropy_ratio",
    "moe_baseline_selected_mass_ratio",
    "moe_baseline_usable",
    "moe_monitor_active",
    "moe_monitor_snapshot_age_seconds",
}


def snapshot(rows):
    facts = {"experts": published.EXPERTS, "top_k": published.TOP_K, "server": "s"}
    return EngineSnapshot(
        "s", "olmoe", "0", published.LAYERS, published.LAYOUT, rows, 1, 0.1, Status(active=True), [facts]
    )


def series(text, change, monkeypatch, tmp_path, seed=0):
    """promtool input: ``change`` gives probabilities, entropy and mass of the traffic after CHANGE minutes."""
    rng = np.random.default_rng(seed)
    normal = published.probabilities(text)
    recorded = [published.rows(published.draw(rng, normal, 2 * TOKENS), 2 * TOKENS) for _ in range(10)]
    path = tmp_path / "normal.json"
    shape = (published.LAYERS, published.EXPERTS, published.TOP_K)
    baseline.write(path, [baseline.summarise(recorded, "olmoe", *shape, 60.0)])
    file = BaselineFile(path)
    monkeypatch.setattr(drift_module, "configured", lambda: file)

    clock = [1000.0]
    monkeypatch.setattr(windows_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    history = History(from_start=False)
    rows = published.rows(published.draw(rng, normal, TOKENS), TOKENS)
    found: dict[str, list[str]] = {}
    steps = END * 60 // STEP
    for step in range(steps):
        after = step * STEP >= CHANGE * 60
        p, entropy, mass = change if after else (normal, 0.8, 0.45)
        rows = rows + published.rows(published.draw(rng, p, TOKENS), TOKENS, entropy, mass)
        clock[0] += STEP
        engine = snapshot(rows)
        history.add([engine])
        for family in families(engine, history, None):
            if family.metric.name not in USED:
                continue
            histogram = family.metric.kind == "histogram"
            values = {"": family.values}
            if histogram:
                values = {"_count": np.asarray(family.values).sum(axis=-1), "_sum": family.sums}
            for suffix, column in values.items():
                for own, value in zip(family.labels, column, strict=True):
                    named = LABELS | dict(zip(family.metric.labels, own, strict=True))
                    line = found.setdefault(family.metric.name + suffix + promtool.labels(named), ["_"] * steps)
                    line[step] = f"{float(value):.9g}"
    return [{"series": name, "values": " ".join(line)} for name, line in found.items()]


def quiet_until_the_change():
    return [promtool.firing(f"{minute}m") for minute in (10, CHANGE)]


@pytest.mark.parametrize("text", published.TEXTS)
def test_healthy_traffic_fires_nothing(text, monkeypatch, tmp_path):
    normal = published.probabilities(text), 0.8, 0.45
    data = series(text, normal, monkeypatch, tmp_path)
    checks = [promtool.firing(f"{minute}m") for minute in range(5, END, 5)]
    promtool.run(tmp_path, [{"input_series": data, "promql_expr_test": checks}])


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(published.TEXTS, 2)))
def test_another_text_is_drift_and_only_drift(before, after, monkeypatch, tmp_path):
    # Another text is somewhat easier or harder for the router: entropy moves a little too.
    data = series(before, (published.probabilities(after), 0.7, 0.5), monkeypatch, tmp_path)
    checks = quiet_until_the_change() + [promtool.firing(f"{m}m", "MoeRoutingDrift") for m in (30, 35, 40, 44)]
    promtool.run(tmp_path, [{"input_series": data, "promql_expr_test": checks}])


@pytest.mark.parametrize("text", published.TEXTS)
def test_shifted_ids_are_drift(text, monkeypatch, tmp_path):
    broken = published.shifted(published.probabilities(text)), 0.8, 0.45
    data = series(text, broken, monkeypatch, tmp_path)
    checks = quiet_until_the_change() + [promtool.firing(f"{m}m", "MoeRoutingDrift") for m in (30, 44)]
    promtool.run(tmp_path, [{"input_series": data, "promql_expr_test": checks}])


@pytest.mark.parametrize("text", published.TEXTS)
def test_every_token_to_one_expert(text, monkeypatch, tmp_path):
    """Within two minutes after the five-minute mean has moved: collapse; within the longer windows: imbalance."""
    broken = published.collapsed(published.probabilities(text)), 0.05, 0.99
    data = series(text, broken, monkeypatch, tmp_path)
    checks = quiet_until_the_change()
    checks.append(promtool.firing("24m", "MoeRouterCollapse"))
    checks += [promtool.fires(f"{m}m", n, firing=True) for m in (32, 44) for n in ("MoeLoadImbalance",)]
    checks.append(promtool.fires("44m", "MoeExpertSilent", firing=False))
    promtool.run(tmp_path, [{"input_series": data, "promql_expr_test": checks}])


@pytest.mark.parametrize("text", published.TEXTS)
def test_every_token_to_one_expert_with_normal_logits(text, monkeypatch, tmp_path):
    """Broken after the router: the probabilities look normal, so imbalance has to say it."""
    broken = published.collapsed(published.probabilities(text)), 0.8, 0.45
    data = series(text, broken, monkeypatch, tmp_path)
    checks = [*quiet_until_the_change(), promtool.firing("32m", "MoeLoadImbalance", "MoeRoutingDrift")]
    promtool.run(tmp_path, [{"input_series": data, "promql_expr_test": checks}])


@pytest.mark.parametrize("text", published.TEXTS)
def test_a_dead_expert(text, monkeypatch, tmp_path):
    broken = published.dead(published.probabilities(text)), 0.8, 0.45
    data = series(text, broken, monkeypatch, tmp_path)
    checks = quiet_until_the_change()
    checks += [promtool.fires(f"{m}m", "MoeExpertSilent", firing=True) for m in (27, 44)]
    others = ("MoeLoadImbalance", "MoeRouterCollapse")
    checks += [promtool.fires(f"{m}m", name, firing=False) for m in (27, 44) for name in others]
    promtool.run(tmp_path, [{"input_series": data, "promql_expr_test": checks}])
