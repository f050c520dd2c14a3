"""What a transformers process says of time: stages, passes, kinds, FLOPs, the cost of imbalance, on its endpoint."""

from __future__ import annotations

import urllib.request

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from serving import only, parse  # noqa: E402
from transformers_models import V5, batch, left_padded, make  # noqa: E402

from moe_monitor.capture.transformers import latency, monitor  # noqa: E402
from moe_monitor.capture.transformers.latency import Clock, TimedPass  # noqa: E402
from moe_monitor.capture.transformers.timings import (  # noqa: E402
    DECODE,
    MIXED,
    PER_ROUND,
    PREFILL,
    Timings,
    kind_of,
)

new_modules = pytest.mark.skipif(not V5, reason="up to 4.57 the modules that this test slows down are others")

MICROSECOND = 1e-6


class Time:
    """A clock that stands still but where modules of the model say that time has gone by."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def takes(self, monkeypatch, module, seconds) -> None:
        """Every call of ``module`` takes ``seconds(arguments)``."""
        inner = module.forward

        def forward(*args):
            self.now += seconds(*args)
            return inner(*args)

        monkeypatch.setattr(module, "forward", forward)


@pytest.fixture
def clock(monkeypatch):
    made = Time()
    monkeypatch.setattr(latency, "time", made)
    return made


@new_modules
def test_the_endpoint_shows_stages_passes_kinds_and_flops(tmp_path, monkeypatch, clock) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = make("olmoe")
    model.set_experts_implementation("eager")  # the FLOP counter knows no grouped products
    for i, layer in enumerate(model.model.layers):
        clock.takes(monkeypatch, layer.mlp.gate, lambda _, i=i: (10 + 30 * i) * MICROSECOND)
        clock.takes(monkeypatch, layer.mlp.experts, lambda *_: 400 * MICROSECOND)
        clock.takes(monkeypatch, layer.self_attn.o_proj, lambda *_: 1000 * MICROSECOND)
    ids, mask = left_padded()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(ids, attention_mask=mask)
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, attention_mask=mask, **arguments)
    with monitor(model, model_name="tiny") as m:
        url = m.serve_metrics(0, directory=tmp_path / "run")
        assert torch.equal(model.generate(ids, attention_mask=mask, **arguments), before)
        m._publisher.publish()
        with urllib.request.urlopen(url) as response:
            samples = parse(response.read().decode())
    assert not m.off, m.reason
    name = "moe_layer_duration_seconds"
    for layer, router in (("0", 10), ("1", 40)):
        for stage, microseconds in (("router", router), ("experts", 400), ("layer", router + 400)):
            for kind, passes in (("prefill", 1), ("decode", 4)):
                labels = {"layer": layer, "stage": stage, "kind": kind}
                assert only(samples, f"{name}_count", **labels) == passes
                total = only(samples, f"{name}_sum", **labels)
                assert total == pytest.approx(passes * microseconds * MICROSECOND, abs=2e-9 * passes)
    step = 50 + 2 * (400 + 1000)
    for kind, passes, tokens in (("prefill", 1, 27), ("decode", 4, 3)):  # padding takes time like any other token
        assert only(samples, "moe_step_duration_seconds_count", kind=kind) == passes
        assert only(samples, "moe_step_duration_seconds_sum", kind=kind) == pytest.approx(passes * step * MICROSECOND)
        assert only(samples, "moe_step_tokens_sum", kind=kind) == passes * tokens
        share = only(samples, "moe_step_moe_seconds_total", kind=kind) / only(
            samples, "moe_step_timed_seconds_total", kind=kind
        )
        assert share == pytest.approx((50 + 800) / step)
    flops = counter.get_flop_counts()
    for layer in ("0", "1"):
        computed = sum(flops[f"OlmoeForCausalLM.model.layers.{layer}.mlp.experts"].values())
        assert only(samples, "moe_layer_sampled_flops_total", layer=layer, kind="prefill") == computed
        assert only(samples, "moe_layer_sampled_flops_total", layer=layer, kind="decode") == 4 * 3 * computed / 27
    # what summaries say of the same passes
    assert m.summary().rows[1]["router_seconds_mean"] == pytest.approx(40 * MICROSECOND, abs=1e-9)
    assert m.summary().rows[1]["layer_seconds_count"] == 5


@new_modules
def test_what_imbalance_costs_is_told_where_time_follows_the_busiest_expert(monkeypatch, clock) -> None:
    model = make("olmoe")

    def law(hidden, ids, weights) -> float:
        return (50 + 10 * int(torch.bincount(ids.reshape(-1), minlength=8).max())) * MICROSECOND

    for layer in model.model.layers:
        clock.takes(monkeypatch, layer.mlp.gate, lambda _: 5 * MICROSECOND)
        clock.takes(monkeypatch, layer.mlp.experts, law)
    observed, even = np.zeros(2), np.zeros(2)
    with torch.no_grad(), monitor(model) as m:
        for seed in range(120):
            ids = batch(4, 16, seed=seed)
            before = m.snapshot().counts  # collects, so that no pass is left out
            model(ids)
            counts = m.snapshot().counts - before
            if seed >= 38:  # the model behind the ratio is asked from its 31st step on, of four in five
                observed += 50 + 10 * counts.max(axis=1)
                even += 50 + 10 * np.ceil(counts.mean(axis=1))
        engine = m.snapshot()
    assert engine.latency is not None
    assert (observed / even > 1.2).all(), "the load is not uneven enough to tell anything"
    np.testing.assert_allclose(engine.latency.cost, observed / even, rtol=0.03)
    assert engine.latency.error < 0.05


@pytest.mark.parametrize(("dense", "computed"), [(False, 5), (True, 3 * 4)])
def test_flops_of_a_timed_pass_are_what_was_computed(dense: bool, computed: int) -> None:
    """Three tokens, four experts; where all experts compute all tokens, what was chosen does not matter."""
    timings = Timings((0,), experts=4, flops=10)
    loads = [([0], torch.tensor([[2, 2, 1, 0]]))]
    timings._take(TimedPass(1, 0.0, 1.0, DECODE, 3, loads=loads, dense=dense), 1000, np.full((1, 3), 5))
    assert timings.collect()
    assert timings.table.arrays["flops"].sum() == 10 * computed


def test_short_passes_are_published_in_part_and_summarised_whole() -> None:
    model = make("olmoe")
    with torch.no_grad(), monitor(model) as m:
        for _ in range(PER_ROUND + 5):
            model(batch(1, 3))
        first = m.snapshot()
        model(batch(1, 1))
        second = m.snapshot()
    assert first.latency.arrays["step"].sum(axis=1).tolist() == [0, PER_ROUND, 0]
    assert second.latency.arrays["step"].sum(axis=1).tolist() == [1, PER_ROUND, 0]
    assert m.summary().rows[0]["layer_seconds_count"] == PER_ROUND + 6
    m.reset()
    assert m.snapshot().latency.arrays["step"].sum() == 0


def test_a_pass_that_fails_is_not_timed_and_layers_compiled_one_by_one_are_timed_as_whole_passes() -> None:
    torch._dynamo.reset()
    model = make("olmoe")
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad(), monitor(model) as m:
        with pytest.raises(ZeroDivisionError):
            model(batch())
        assert m.snapshot().latency.arrays["step"].sum() == 0
        handle.remove()
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
        model(batch())
    assert not m.off, m.reason
    arrays = m.snapshot().latency.arrays
    assert (arrays["step"].sum(), arrays["layer"].sum(), arrays["timed_ns"].sum()) == (1, 0, 0)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("cumulative", "kind"), [([0, 1, 2], DECODE), ([0, 5, 12, 12], PREFILL), ([0, 1, 9], MIXED), ([0, 1, 1], DECODE)]
)
def test_kinds_of_continuous_batches(cumulative: list[int], kind: int) -> None:
    assert kind_of(torch.tensor(cumulative)) == kind


class Event:
    """A CUDA event that passes when the test says so."""

    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.at: float | None = None

    def query(self) -> bool:
        return self.at is not None

    def synchronize(self) -> None:
        assert self.at is not None, "waits for ever"

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_events_are_read_when_they_have_passed_and_used_again(monkeypatch) -> None:
    taken, made = [], []

    def new(**_) -> Event:
        made.append(Event())
        made[-1].record = lambda _stream: None
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Event", new)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: None)
    clock = Clock(1, lambda timed, whole, stages: taken.append((timed.number, whole, stages.tolist())))

    def run() -> list[Event]:
        clock.begin(Event.device)
        marks = [clock.mark(Event.device) for _ in range(3)]
        clock.current.stages.append((0, 0, marks[0], marks[1]))
        clock.current.stages.append(
            (1, 0, marks[1], marks[2])
        )  # one event for the end of a stage and the beginning of the next
        begin = clock.current.begin
        clock.end(Event.device, DECODE, 1)
        end = clock.current.end
        clock.finish(good=True)
        return [begin, *marks, end]

    first, second = run(), run()
    assert taken == []
    for event, at in zip(first, (0.0, 0.010, 0.030, 0.100, 0.2), strict=True):  # milliseconds
        event.at = at
    clock.settle()
    assert taken == [(1, 200_000, [[20_000, 70_000, -1]])]
    third = run()
    assert {id(e) for e in third} == {id(e) for e in first}, "events that were read are used again, each once"
    assert len(made) == 10
    for event in second + third:
        event.at = 1.0
    assert clock.totals()["router"][0].tolist() == [3]
    assert [number for number, *_ in taken] == [1, 2, 3]
