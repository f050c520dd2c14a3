"""Which passes are timed and what their stamps say; twins of graphs, on a driver that is simulated.

With real graphs on a GPU: ``tests/test_stamps.py`` and ``benchmarks/gpu/latency.py``.
"""

from __future__ import annotations

import functools
import logging
import threading
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fake_cuda import STAMP_NS, FakeDriver  # noqa: E402 - needs torch, as what follows

from moe_monitor.capture import clock as clock_module  # noqa: E402
from moe_monitor.capture import device_clock  # noqa: E402
from moe_monitor.capture.clock import (  # noqa: E402
    ENTER,
    GATE_BEGIN,
    GATE_END,
    LEAVE,
    ROUTE_BEGIN,
    ROUTE_END,
    HostClock,
    Sampler,
    Work,
    kind_of,
    stages_of,
)
from moe_monitor.capture.device_clock import DeviceClock  # noqa: E402
from moe_monitor.capture.driver import DriverError  # noqa: E402
from moe_monitor.capture.fuse import Fuse  # noqa: E402

device_clock._BETWEEN = 1.0  # the simulated device's stamps take the same everywhere
LAYERS, EXPERTS = 2, 4
GATE, TOP_K, MOVE, GEMM = 4_000, 3_000, 1_000, 50_000
#: The monitor's own node at the end of a graph, which is no part of the step.
COUNT = 700_000


def stamps(**at: int) -> np.ndarray:
    points = np.zeros((1, 6), dtype=np.int64)
    for name, value in at.items():
        points[0, getattr(clock_module, name)] = value
    return points


def test_stages_of_a_gate_before_the_layer():
    # a stamp takes 1; gate 10, a pause of 7 that is nobody's, dispatch 4, top-k 5, experts 20
    points = stamps(GATE_BEGIN=100, GATE_END=111, ENTER=119, ROUTE_BEGIN=124, ROUTE_END=130, LEAVE=151)
    assert stages_of(points, 1).tolist() == [[15, 24, 39]]


def test_stages_of_a_gate_within_the_layer():
    # dispatch 3, gate 10, pause 2, top-k 5, experts 20
    points = stamps(ENTER=100, GATE_BEGIN=104, GATE_END=115, ROUTE_BEGIN=118, ROUTE_END=124, LEAVE=145)
    assert stages_of(points, 1).tolist() == [[15, 25, 40]]


def test_without_the_gate_only_the_experts_are_told():
    points = stamps(ENTER=100, ROUTE_BEGIN=105, ROUTE_END=111, LEAVE=132)
    assert stages_of(points, 1).tolist() == [[-1, 24, -1]]


def test_stamps_that_lack_or_are_out_of_order_tell_nothing():
    assert stages_of(stamps(ENTER=100, ROUTE_BEGIN=105, LEAVE=132), 0).tolist() == [[-1, -1, -1]]
    early = stamps(GATE_BEGIN=1, GATE_END=2, ENTER=100, ROUTE_BEGIN=111, ROUTE_END=105, LEAVE=132)
    assert stages_of(early, 0).tolist() == [[-1, -1, -1]]


def test_kinds_of_passes():
    decode, prefill, mixed = range(3)
    assert kind_of({"a": 1, "b": 1}, 1) == decode
    assert kind_of({"a": 4, "b": 1}, 4) == decode, "three draft tokens"
    assert kind_of({"a": 700}, 1) == prefill
    assert kind_of({"a": 700, "b": 1}, 1) == mixed


def test_ranks_sample_the_same_passes_without_a_rhythm():
    one, two = Sampler(100), Sampler(100)
    hits = [n for n in range(1, 100_001) if one.hit(n)]
    assert hits == [n for n in range(1, 100_001) if two.hit(n)]
    assert 900 < len(hits) < 1_100
    distances = np.diff(hits)
    assert distances.min() >= 50 and distances.max() <= 151 and len(set(distances.tolist())) > 50


def test_the_host_clock_leaves_the_monitors_own_work_out(monkeypatch):
    now = [0]
    monkeypatch.setattr(clock_module.time, "perf_counter_ns", lambda: now[0])
    clock = HostClock(1, 1, Work(flops=6), EXPERTS)
    before, after = np.zeros((1, 9), dtype=np.int64), np.zeros((1, 9), dtype=np.int64)
    after[0, :EXPERTS] = (3, 0, 1, 0)
    after[0, EXPERTS:] = 77  # other columns of the row
    now[0] = 1_000
    clock.begin(1, 2, lambda: 0, before)
    for point, at in ((GATE_BEGIN, 2_000), (GATE_END, 2_500), (ENTER, 2_500), (ROUTE_BEGIN, 2_500), (ROUTE_END, 2_900)):
        now[0] = at
        clock.point(0, point)
    clock.leave_out(10_000)
    now[0] = 2_900 + 10_000 + 700
    clock.point(0, LEAVE)
    now[0] += 100
    clock.stop()
    clock.end(after)
    assert clock.collect() and not clock.collect()
    arrays = clock.table.arrays
    assert arrays["layer_ns"][0, :, 0].tolist() == [900, 700, 1_600]
    assert arrays["step_ns"][0] == 2_700
    assert arrays["flops"][0, 0] == 6 * 4


# CUDA devices


class Clock(DeviceClock):
    """On a CPU: nothing is asynchronous."""

    def _stream(self) -> int:
        return 0

    def _record(self):
        return type("Event", (), {"query": staticmethod(lambda: True)})

    def _make_current(self) -> None: ...


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``."""

    def __init__(self, driver: FakeDriver) -> None:
        self.driver = driver
        self.executable = 0

    def replay(self) -> None:
        self.driver.launch_graph(self.executable, 0)


def made(every: int = 1, experts: list[int] | None = None) -> tuple[FakeDriver, DeviceClock]:
    driver = FakeDriver()
    work = Work(2, experts)
    clock = Clock(LAYERS, every, work, EXPERTS, width=EXPERTS + 3, device=torch.device("cpu"), driver=driver)
    clock._sampler.hit = lambda number: number % every == 0
    return driver, clock


def block(driver: FakeDriver, clock: DeviceClock, layer: int, slow: int = 0, gate: str = "nvjet_gate") -> None:
    """One layer of a model: norm and gate, dispatch, top-k, and GEMMs beside a shared expert on a stream of its own."""
    driver.kernel("norm", 2_000)
    if clock.sampling:  # outside of graphs the gate runs once more
        clock.point(layer, GATE_BEGIN)
        driver.kernel(gate, GATE)
        clock.point(layer, GATE_END)
    else:
        driver.kernel(gate, GATE)
    clock.enter(layer, torch.empty(1))
    driver.kernel("dispatch", MOVE)
    clock.point(layer, ROUTE_BEGIN)
    driver.kernel("topk", TOP_K)
    clock.point(layer, ROUTE_END)
    if driver.capturing is not None:
        driver.fork(1)
        driver.kernel("shared", 500, stream=1)
    driver.kernel("gemm", GEMM + slow, early=True)
    if driver.capturing is not None:
        driver.join(1)
    clock.point(layer, LEAVE)
    driver.kernel("attention", 9_000)


def captured(driver: FakeDriver, clock: DeviceClock, key=("FULL", 8), gate: str = "nvjet_gate", beside=False) -> Graph:
    """``beside``: one more graph of the same capture."""
    graph = Graph(driver)
    if beside:
        clock.capturing = True
    else:
        clock.before_capture()
    driver.begin_capture()
    for layer in range(LAYERS):
        block(driver, clock, layer, gate=gate)
    clock.note_end()
    driver.kernel("moe_monitor_count", COUNT)
    clock.end_of_graph(graph, key, whole=key[0] == "FULL")
    graph.executable = driver.end_capture()
    clock.after_capture()
    return graph


def run(clock: DeviceClock, work, number: int, key=None, rows=None) -> None:
    clock.begin(number, 8, lambda: 0, rows)
    work()
    if clock.sampling:
        clock.stop()
    clock.end(key, rows)


EXPECTED = {"router": GATE + TOP_K, "experts": MOVE + GEMM + 500, "layer": GATE + TOP_K + MOVE + GEMM + 500}


def test_a_twin_times_what_the_graph_does_and_runs_the_same_kernels():
    driver, clock = made()
    graph = captured(driver, clock)
    key = ("FULL", 8)
    graph.replay()
    ordinary, driver.ran = driver.ran, []
    run(clock, graph.replay, 1, key)
    assert driver.ran == ordinary
    assert clock.collect()
    assert clock.table.arrays["step"].sum() == 1
    assert clock.table.arrays["layer"].sum() == 0, "its twin was not ready yet: timed as a whole"
    driver.ran = []
    run(clock, graph.replay, 2, key)
    assert sorted(driver.ran) == sorted(ordinary)
    order = [name for name in driver.ran if name != "shared"]
    assert order == [name for name in ordinary if name != "shared"]
    assert clock.collect()
    arrays = clock.table.arrays
    assert arrays["layer_ns"][:, :, 0].tolist() == [list(EXPECTED.values())] * LAYERS
    step = LAYERS * (2_000 + GATE + MOVE + TOP_K + 500 + GEMM + 9_000)
    assert arrays["timed_ns"][0] == pytest.approx(step, abs=3 * STAMP_NS)
    assert arrays["moe_ns"][0] == LAYERS * EXPECTED["layer"]


def test_passes_that_are_not_sampled_run_the_ordinary_graph():
    driver, clock = made(every=10)
    graph = captured(driver, clock)
    for number in range(1, 31):
        before = driver.now
        run(clock, graph.replay, number, ("FULL", 8))
        if number % 10:
            assert driver.now - before == LAYERS * (2_000 + GATE + MOVE + TOP_K + 500 + GEMM + 9_000) + COUNT
        clock.collect()
    assert clock.table.arrays["step"].sum() == 3


def test_the_pieces_of_a_pass_are_timed_together():
    driver, clock = made()
    clock.before_capture()
    pieces, key = [], ("PIECEWISE", 8)
    for layer in range(LAYERS):
        graph = Graph(driver)
        driver.begin_capture()
        block(driver, clock, layer)
        clock.end_of_graph(graph, key, whole=False)
        graph.executable = driver.end_capture()
        pieces.append(graph)
    clock.after_capture()
    for number in (1, 2):
        run(clock, lambda: [piece.replay() for piece in pieces], number, key)
        clock.collect()
    assert clock.table.arrays["layer_ns"][:, :, 0].tolist() == [list(EXPECTED.values())] * LAYERS


def test_a_pass_without_a_graph_is_stamped_between_its_kernels():
    driver, clock = made()
    rows = torch.zeros((LAYERS, EXPERTS + 3), dtype=torch.int64)

    def work():
        for layer in range(LAYERS):
            block(driver, clock, layer, slow=layer * 7_000)
        rows[:, :EXPERTS] += torch.tensor([5, 0, 2, 1])

    run(clock, work, 1, None, rows)
    clock.collect()
    arrays = clock.table.arrays
    difference = arrays["layer_ns"][1, 1, 0] - arrays["layer_ns"][0, 1, 0]
    assert difference == 7_000, "a slower layer shows in its own stage"
    assert arrays["layer_ns"][0, 0, 0] == arrays["layer_ns"][1, 0, 0]
    assert arrays["flops"][:, 0].tolist() == [2 * 8] * LAYERS


def test_only_the_experts_of_this_rank_are_its_work():
    driver, clock = made(experts=[2, 3])
    rows = torch.zeros((LAYERS, EXPERTS + 3), dtype=torch.int64)

    def work():
        for layer in range(LAYERS):
            block(driver, clock, layer)
        rows[:, :EXPERTS] += torch.tensor([5, 0, 2, 1])

    run(clock, work, 1, None, rows)
    clock.collect()
    assert clock.table.arrays["flops"][:, 0].tolist() == [2 * 3] * LAYERS


@pytest.mark.parametrize(("gate", "found"), [("gemvx_bf16", True), ("rms_norm_only", False)])
def test_a_gate_is_known_by_its_kernels_name(gate, found):
    driver, clock = made()
    graph = captured(driver, clock, gate=gate)
    for number in (1, 2):
        run(clock, graph.replay, number, ("FULL", 8))
        clock.collect()
    timed = clock.table.arrays["layer"].sum(axis=(0, 2, 3)) > 0
    assert timed.tolist() == [found, True, found]


def test_a_twin_that_cannot_be_launched_costs_a_sample_and_no_pass():
    driver, clock = made()
    graph = captured(driver, clock)
    run(clock, graph.replay, 1, ("FULL", 8))
    clock.collect()
    launch_graph = driver.launch_graph

    def refuse_twins(executable, stream):
        if executable != graph.executable:
            raise DriverError("cuGraphLaunch: CUDA_ERROR_UNKNOWN (999)")
        launch_graph(executable, stream)

    driver.launch_graph = refuse_twins
    driver.ran = []
    run(clock, graph.replay, 2, ("FULL", 8))
    run(clock, graph.replay, 3, ("FULL", 8))
    assert len(driver.ran) == 2 * (7 * LAYERS + 1)
    clock.collect()
    assert clock.table.arrays["step"].sum() == 3
    assert clock.table.arrays["layer"].sum() == 0


def test_a_graph_whose_twin_the_driver_refuses_is_timed_as_a_whole_and_the_others_are_not():
    driver, clock = made()
    first, second = captured(driver, clock), captured(driver, clock, ("FULL", 16), beside=True)
    instantiate, graphs = driver.instantiate, set(driver.graphs)

    def refuse_once(graph):
        driver.instantiate = instantiate
        raise DriverError("cuGraphInstantiateWithFlags: CUDA_ERROR_INVALID_VALUE (1)")

    driver.instantiate = refuse_once
    for number in range(1, 7):
        graph, key = ((first, ("FULL", 8)), (second, ("FULL", 16)))[number % 2 == 0]
        run(clock, graph.replay, number, key)
        clock.collect()
    (why,) = clock.refusals
    assert "INVALID_VALUE" in why
    assert "nodes by type {0: " in why
    assert len(graphs) - len(driver.graphs) == 2, "neither twin's clone is kept"
    assert clock.table.arrays["step"].sum() == 6
    assert clock.table.arrays["layer"][0, -1].sum() == 2, "the second graph, once its twin was ready"


def test_a_graph_that_is_met_again_while_its_twin_is_made_ready_gets_one_twin():
    """The model runs on another thread than the one that makes twins ready."""
    driver, clock = made()
    graph = captured(driver, clock)
    instantiate, made_ready = driver.instantiate, []

    def slow(clone):
        made_ready.append(clone)
        run(clock, graph.replay, 1 + len(made_ready), ("FULL", 8))
        return instantiate(clone)

    driver.instantiate = slow
    run(clock, graph.replay, 1, ("FULL", 8))
    for _ in range(3):
        clock.collect()
    assert len(made_ready) == 1
    assert clock.refusals == []
    run(clock, graph.replay, 9, ("FULL", 8))
    clock.collect()
    assert clock.table.arrays["step"].sum() == 3
    assert clock.table.arrays["layer"][0, -1].sum() == 1, "the last pass, with the twin"


def test_letting_go_does_not_wait_for_a_driver_that_hangs(monkeypatch):
    """It may be the thread that runs the model. What is being made ready is never launched."""
    monkeypatch.setattr(device_clock, "_LET_GO", 0.05)
    driver, clock = made()
    graph = captured(driver, clock)
    instantiate, begun, ends = driver.instantiate, threading.Event(), threading.Event()

    def hang(clone):
        begun.set()
        assert ends.wait(10)
        return instantiate(clone)

    driver.instantiate = hang
    run(clock, graph.replay, 1, ("FULL", 8))
    publisher = threading.Thread(target=clock.collect)
    publisher.start()
    assert begun.wait(10)
    clock.close()  # comes back
    assert publisher.is_alive()
    ends.set()
    publisher.join(10)
    driver.ran = []
    graph.replay()
    assert len(driver.ran) == 7 * LAYERS + 1, "the graph itself"


def test_refused_twins_are_counted_and_said_once(caplog):
    from moe_monitor.capture.vllm.latency import Timing

    fuse = Fuse(logging.getLogger("vllm.moe_monitor"))
    _, clock = made()
    timing = Timing(SimpleNamespace(fuse=fuse), [None] * LAYERS, 10, Work(1, None, True), 8)
    timing.clock = clock
    with caplog.at_level("WARNING", "vllm.moe_monitor"):
        for why in ("the first", "the second"):
            clock.refusals.append(why)
            timing.collect()
            timing.collect()
    assert fuse.status.errors == {"latency": 2}
    assert not fuse.blown
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["the first"]


class Worker:
    """Its timing, and what of its one layer is wrapped while a pass is timed: a method of a class, and one of an
    object's own. Each pass in three is timed.
    """

    def __init__(self) -> None:
        from moe_monitor.capture.vllm.latency import Timing

        class Layer:
            def _forward_impl(self, hidden, logits):
                return hidden

        self.layer, self.gate = Layer(), SimpleNamespace(forward=lambda hidden: hidden)
        self.own = self.gate.forward
        self.timing = Timing(
            SimpleNamespace(fuse=Fuse(logging.getLogger("test")), meter=None), [(0, None)], 3, Work(1), 8
        )
        _, self.timing.clock = made(every=3)
        self.timing._wrapped = [
            (self.layer, "_forward_impl", functools.partial(self.timing._layer, 0, None)),
            (self.gate, "forward", functools.partial(self.timing._gate, 0)),
        ]

    @property
    def wrapped(self) -> bool:
        found = "_forward_impl" in vars(self.layer), self.gate.forward is not self.own
        assert found[0] is found[1]
        return found[0]

    def begin_a_timed_pass(self) -> None:
        while self.timing.clock is not None and not self.timing.sampling:
            self.timing.begin(3)


def test_a_layer_is_wrapped_while_its_pass_is_timed():
    worker, timed = Worker(), []
    for _ in range(12):
        assert not worker.wrapped
        worker.timing.begin(3)
        assert worker.wrapped is worker.timing.sampling
        timed.append(worker.timing.sampling)
        if worker.timing.sampling and sum(timed) == 2:
            worker.timing.dummy()
        worker.timing.end(None)
    assert sum(timed) == 4


@pytest.mark.parametrize("how", ["fails", "fails while a pass begins", "detached"])
def test_a_layer_is_its_own_again_when_timing_ends(how):
    worker = Worker()
    timing, at_once = worker.timing, how == "fails while a pass begins"
    began = timing.clock.begin

    def begin(*args):
        began(*args)
        if at_once and timing.sampling:
            timing.fail(RuntimeError("now"))

    timing.clock.begin = begin
    worker.begin_a_timed_pass()
    assert worker.wrapped is not at_once
    if how == "fails":
        timing.fail(RuntimeError("now"))
    elif how == "detached":
        pytest.importorskip("vllm")
        from moe_monitor.capture.vllm.attach import Capture
        from moe_monitor.capture.vllm.wrapping import Wrapping

        Capture.detach(SimpleNamespace(timing=timing, _wrapping=Wrapping()))
    assert not worker.wrapped


def test_what_others_put_on_a_layer_is_called_and_stays():
    worker, called = Worker(), []
    worker.gate.forward = others = called.append
    worker.begin_a_timed_pass()
    worker.gate.forward("hidden")
    assert called == ["hidden"]
    worker.timing.end(None)
    assert worker.gate.forward is others
    worker.begin_a_timed_pass()
    worker.layer._forward_impl = others  # in the middle of a pass
    worker.timing.end(None)
    assert worker.layer._forward_impl is others


def test_layers_are_wrapped_while_graphs_are_captured():
    worker = Worker()
    worker.timing.before_graphs()
    assert worker.wrapped
    worker.timing.after_graphs()
    assert not worker.wrapped


def test_no_more_twins_than_device_memory_is_set_aside_for(monkeypatch):
    driver, clock = made()
    first, second = captured(driver, clock), captured(driver, clock, ("FULL", 16), beside=True)
    monkeypatch.setattr(device_clock, "_MOST_NODES", 1)  # enough for one
    for number in range(1, 5):
        graph, key = ((first, ("FULL", 8)), (second, ("FULL", 16)))[number % 2 == 0]
        run(clock, graph.replay, number, key)
        clock.collect()
    assert clock._groups["FULL", 8].ready
    assert not clock._groups["FULL", 16].ready
    assert clock.table.arrays["step"].sum() == 4


def test_a_device_that_is_far_behind_loses_samples_and_waits_for_nothing():
    driver, clock = made()
    clock._record = lambda: type("Event", (), {"query": staticmethod(lambda: False)})
    for number in range(1, 13):
        run(clock, lambda: block(driver, clock, 0), number)
        assert not clock.collect()
    assert clock.dropped == 4


def test_graphs_captured_anew_replace_their_twins():
    driver, clock = made()
    old = captured(driver, clock)
    run(clock, old.replay, 1, ("FULL", 8))
    clock.collect()
    executables = set(driver.executables)
    new = captured(driver, clock)
    assert len(executables - set(driver.executables)) == 1, "the old twin was let go of"
    for number in (2, 3):
        run(clock, new.replay, number, ("FULL", 8))
        clock.collect()
    assert clock.table.arrays["layer"].sum() == LAYERS * 3
    driver.ran = []
    run(clock, old.replay, 4, ("FULL", 8))
    assert len(driver.ran) == 7 * LAYERS + 1
