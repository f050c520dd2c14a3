"""Durations of sampled steps: the table that adds them up, its merge over ranks, and the metrics made of it."""

from __future__ import annotations

import numpy as np
import pytest
from boards import FakeWorker
from prometheus_client.parser import text_string_to_metric_families

from moe_monitor.catalog import STAGES
from moe_monitor.costmodel import CostModel, balanced, features
from moe_monitor.export.collector import MoeCollector
from moe_monitor.latency import LatencyTable, RankLatency, SampledStep, latency_segment, merge

DECODE, PREFILL, MIXED = range(3)


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run"


def stages(layers: int, router: float, experts: float) -> np.ndarray:
    """Microseconds for every layer -> nanoseconds by stage."""
    row = [round(1000 * router), round(1000 * experts), round(1000 * (router + experts))]
    return np.tile(np.array(row, dtype=np.int64), (layers, 1))


def rank(table: LatencyTable, ep_rank: int | None = None, layers: tuple[int, ...] | None = None) -> RankLatency:
    return RankLatency(layers or tuple(range(table.layers)), table.arrays, ep_rank)


def test_a_step_lands_in_the_buckets_of_its_kind():
    table = LatencyTable(2)
    table.add(SampledStep(1, DECODE, 64, 1_500_000, stages(2, 10.0, 40.0)))  # 10 us: on an edge, which is inclusive
    table.add(SampledStep(2, MIXED, 700, 30_000_000, stages(2, 30.5, 4_000.0)))
    a = table.arrays
    assert a["layer"][0, STAGES.index("router"), 0].tolist() == [0, 1] + [0] * 14  # 5, 10 us
    assert a["layer"][1, STAGES.index("router"), 1].tolist() == [0, 0, 0, 0, 1] + [0] * 11  # 50 us
    assert a["layer_ns"][0, STAGES.index("layer")].tolist() == [50_000, 4_030_500]
    assert a["step_ns"].tolist() == [1_500_000, 0, 30_000_000]
    assert a["tokens_sum"].tolist() == [64, 0, 700]
    assert a["moe_ns"].tolist() == [100_000, 0, 8_061_000]


def test_a_step_whose_layers_were_not_timed_counts_as_a_step_only():
    table = LatencyTable(2)
    table.add(SampledStep(1, DECODE, 3, 900_000))
    half = stages(2, 10, 20)
    half[1] = -1
    table.add(SampledStep(2, DECODE, 3, 900_000, half))
    assert table.arrays["step"].sum() == 2
    assert table.arrays["timed_ns"].sum() == 0, "half a pass has no MoE share"
    assert table.arrays["layer"][:, 0].sum(axis=(1, 2)).tolist() == [1, 0]


def test_tensor_parallel_ranks_are_samples_of_their_own_and_pipeline_stages_are_put_together():
    one, two, late = LatencyTable(2), LatencyTable(2), LatencyTable(1)
    for table in (one, two):
        table.add(SampledStep(1, DECODE, 4, 2_000_000, stages(2, 10, 20)))
    late.add(SampledStep(1, DECODE, 4, 3_000_000, stages(1, 10, 50)))
    merged = merge([rank(one), rank(two), rank(late, layers=(2,))])
    assert merged is not None
    assert merged.layers == (0, 1, 2)
    assert merged.arrays["layer"][:, 2].sum(axis=(1, 2)).tolist() == [2, 2, 1]
    assert merged.arrays["step"].sum() == 2, "a step is timed by the first stage's ranks"
    assert merged.wait == {} and merged.experts_ns == {}


def test_the_wait_for_the_slowest_rank_is_told_over_common_steps():
    fast, slow = LatencyTable(1), LatencyTable(1)
    for number, (a, b) in {10: (30, 40), 20: (20, 40), 30: (50, 20)}.items():
        fast.add(SampledStep(number, DECODE, 4, 1_000_000, stages(1, 5, a)))
        if number != 30:
            slow.add(SampledStep(number, DECODE, 4, 1_000_000, stages(1, 5, b)))
    merged = merge([rank(fast, 0), rank(slow, 1)])
    assert merged is not None
    assert merged.wait == {0: pytest.approx(30 / 80), 1: 0.0}
    assert merged.experts_ns == {0: 100_000, 1: 80_000}


def test_a_table_of_another_form_is_refused():
    arrays = LatencyTable(2).arrays
    with pytest.raises(ValueError, match="has shape"):
        RankLatency((0, 1, 2), arrays)
    with pytest.raises(ValueError, match="stages have shape"):
        LatencyTable(2).add(SampledStep(1, DECODE, 1, 1, stages(3, 1, 1)))


def test_features_of_a_load():
    counts = np.array([[0, 1, 17, 130], [37, 37, 37, 37]])
    assert features(counts).tolist() == [[1, 3, 1 + 2 + 9, 1 + 1 + 3, 130], [1, 4, 12, 4, 37]]
    assert balanced(np.array([[0, 1, 17, 128]])).tolist() == [[37, 37, 36, 36]]


def test_the_cost_model_finds_a_planted_law_and_states_its_error():
    """Times by a law that is not the model's own (a roofline: the larger of reading weights and computing tiles)."""
    draw = np.random.default_rng(7)
    model = CostModel(4)

    def law(counts):
        weights = 3.0 * (counts > 0).sum(axis=1)
        compute = 1.1 * (-(-counts // 64)).sum(axis=1) * 2
        return 1e-6 * (8 + np.maximum(weights, compute))

    truth = np.zeros(2)
    for _ in range(600):
        tokens = int(draw.choice([8, 32, 128, 512]))
        skew = draw.dirichlet(np.full(32, 0.4), size=4)
        counts = np.stack([draw.multinomial(8 * tokens, p) for p in skew])
        seconds = law(counts) * draw.normal(1, 0.01, size=4)
        model.add(counts, seconds)
        truth += law(counts).sum(), law(balanced(counts)).sum()
    assert model.error < 0.1
    told = model.observed.sum() / model.level.sum()
    assert told == pytest.approx(truth[0] / truth[1], abs=0.05)
    assert told < 0.97, "a skewed batch reads fewer experts' weights"


def test_no_cost_is_told_before_enough_steps_or_outside_of_what_was_seen():
    model = CostModel(1)
    for _ in range(20):
        model.add(np.array([[100, 0, 0, 0]]), np.array([1e-4]))
    assert model.level.sum() == 0 and np.isnan(model.error)
    for _ in range(100):
        model.add(np.array([[100, 0, 0, 0]]), np.array([1e-4]))
    assert model.level.sum() == 0, "four experts were never seen at once"
    assert model.error < 0.01


def test_the_metrics_of_a_worker_that_times_its_steps(directory):
    table = LatencyTable(2)
    table.add(SampledStep(1, DECODE, 64, 1_500_000, stages(2, 10, 40), flops=np.array([10**9, 2 * 10**9])))
    table.add(SampledStep(2, PREFILL, 4096, 40_000_000, stages(2, 50, 900)))
    with FakeWorker(directory, tokens=5, layers=(0, 1), latency=table.arrays):
        collector = MoeCollector(directory, server="server-1")
        text = collector.render().decode()
        small = MoeCollector(directory, server="server-1", max_series=100).render().decode()
    samples = {
        (s.name, *sorted((k, v) for k, v in s.labels.items() if k in ("layer", "stage", "kind", "le"))): s.value
        for f in text_string_to_metric_families(text)
        for s in f.samples
    }
    decode = (("kind", "decode"), ("layer", "1"))
    whole, router = (*decode, ("stage", "layer")), (*decode, ("le", "1e-05"), ("stage", "router"))
    assert samples[("moe_layer_sampled_flops_total", *decode)] == 2e9
    assert samples[("moe_layer_duration_seconds_sum", *whole)] == pytest.approx(50e-6)
    assert samples[("moe_layer_duration_seconds_count", *whole)] == 1
    assert samples[("moe_layer_duration_seconds_bucket", *router)] == 1
    assert samples["moe_step_duration_seconds_sum", ("kind", "prefill")] == pytest.approx(0.04)
    assert samples["moe_step_tokens_sum", ("kind", "decode")] == 64
    assert samples["moe_step_moe_seconds_total", ("kind", "decode")] == pytest.approx(100e-6)
    assert not any(key[0] == "moe_step_duration_seconds_sum" and ("kind", "mixed") in key for key in samples)
    assert 'stage="router"' in text and 'stage="router"' not in small and 'stage="layer"' in small


def test_a_worker_that_timed_nothing_shows_no_zeros(directory):
    with FakeWorker(directory, tokens=5, layers=(0, 1), latency=LatencyTable(2).arrays):
        text = MoeCollector(directory, server="server-1").render().decode()
    assert "moe_routed_tokens_total" in text
    assert "_duration_seconds" not in text


def test_the_segment_has_the_arrays_of_the_table():
    assert {k: (v.dtype.str, v.shape) for k, v in LatencyTable(3).arrays.items()} == latency_segment(3)
