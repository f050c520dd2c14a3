"""The alert on slow layers against traffic of all sizes: timed steps on a simulated clock, promtool over them.

Step times by batch size are those measured on an H100 with OLMoE's shape, not a law of ours: 1.47 ms for one token,
then 4.0, 5.1, 5.4 and 5.8 ms for 8, 32, 64 and 256. A layer takes a sixteenth of 0.7 of it.
"""

import numpy as np
import promtool
import pytest

STEP = 30  # seconds
LABELS = {"job": "vllm", "instance": "a:8000", "model_name": "olmoe", "engine": "0"}
BATCHES, STEP_MS = (1, 8, 32, 64, 256), (1.47, 4.0, 5.1, 5.4, 5.8)
HOURS = 4
CHANGE = 200  # minutes


def layer_seconds(tokens):
    """Between the measured sizes linear in the logarithm; prompts beyond them in proportion."""
    decode = np.interp(np.log2(tokens), np.log2(BATCHES), STEP_MS) * np.maximum(1, tokens / 256)
    return 0.7e-3 * decode / 16


def mean_batches(minute, pattern, rng):
    """Mean tokens of a decode step in these thirty seconds."""
    if pattern == "waves":  # quiet and busy within the hour
        return 2 ** (4 + 3.5 * np.sin(minute / 11))
    if pattern == "steps":  # another load every 25 minutes, from one request to 256
        return float(BATCHES[int(minute // 25) % 5])
    return 2 ** rng.uniform(0, 8)  # anything, at any time


def series(pattern, slower, seed):
    """promtool input; decode steps of mixed sizes, and one step in five with prompts of changing length."""
    rng = np.random.default_rng(seed)
    n = HOURS * 3600 // STEP
    totals = {}
    lines = {}

    def add(name, value, at, **labels):
        key = name + promtool.labels(LABELS | labels)
        totals[key] = totals.get(key, 0.0) + value
        lines.setdefault(key, ["_"] * n)[at] = f"{totals[key]:.9g}"

    for at in range(n):
        minute = at * STEP / 60
        for kind, layer_kind, samples in (("decode", "decode", 24), ("mixed", "prefill", 6)):
            mean = mean_batches(minute, pattern, rng) * (1 if kind == "decode" else 12)
            tokens = np.maximum(1, np.round(rng.lognormal(np.log(mean), 0.5, samples)))
            for layer in (0, 7):
                times = layer_seconds(tokens) * (1 + 0.2 * (layer == 7)) * rng.normal(1, 0.05, samples)
                times = times * (slower if minute >= CHANGE and layer == 7 else 1)
                labels = {"layer": str(layer), "stage": "layer", "kind": layer_kind}
                add("moe_layer_duration_seconds_sum", times.sum(), at, **labels)
                add("moe_layer_duration_seconds_count", samples, at, **labels)
            add("moe_step_tokens_sum", tokens.sum(), at, kind=kind)
            add("moe_step_tokens_count", samples, at, kind=kind)
    return [{"series": key, "values": " ".join(values)} for key, values in lines.items()]


@pytest.mark.parametrize("pattern", ["waves", "steps", "anything"])
def test_traffic_of_changing_size_fires_nothing(pattern, tmp_path):
    checks = [promtool.firing(f"{minute}m") for minute in range(5, 60 * HOURS, 5)]
    promtool.run(tmp_path, [{"input_series": series(pattern, 1.0, 1), "promql_expr_test": checks}])


@pytest.mark.parametrize("pattern", ["waves", "anything"])
def test_one_layer_twice_as_slow_fires_within_half_an_hour(pattern, tmp_path):
    checks = [promtool.firing(f"{minute}m") for minute in range(60, CHANGE + 10, 5)]
    checks += [promtool.firing(f"{CHANGE + 28}m", "MoeLayerLatencyRegressed")]
    promtool.run(tmp_path, [{"input_series": series(pattern, 2.0, 2), "promql_expr_test": checks}])
