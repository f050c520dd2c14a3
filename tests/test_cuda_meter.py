"""The CUDA meter's bookkeeping, with Triton's interpreter in place of a GPU.

A graph replay writes new values into the memory that capture saw; here the test does. On a machine with a GPU
``benchmarks/gpu/exact.py`` shows the same with real graphs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import subprocess
import sys
import threading
import weakref
from array import array
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from short_ways import RunnerV2, output  # noqa: E402

from moe_monitor.capture import kernels, quick  # noqa: E402 - needs torch
from moe_monitor.capture.ahead import compile_beside  # noqa: E402
from moe_monitor.capture.control import Control  # noqa: E402
from moe_monitor.capture.cuda import CudaMeter  # noqa: E402
from moe_monitor.capture.fuse import Fuse  # noqa: E402
from moe_monitor.capture.mailbox import Mailbox  # noqa: E402
from moe_monitor.capture.meter import accumulate  # noqa: E402
from moe_monitor.capture.replays import Watched  # noqa: E402
from moe_monitor.capture.retained import Span  # noqa: E402
from moe_monitor.capture.sending import Ring  # noqa: E402
from moe_monitor.capture.tallies import DeviceTallies, Owners  # noqa: E402
from moe_monitor.layout import RowLayout  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LAYERS, EXPERTS, TOP_K = 3, 16, 4
LAYOUT = RowLayout(EXPERTS)

interpreted = pytest.mark.skipif(not INTERPRETED, reason="test_in_the_interpreter runs this in Triton's interpreter")


@pytest.mark.skipif(INTERPRETED or kernels.triton is None, reason="runs the other tests of this file")
def test_in_the_interpreter() -> None:
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-W", "ignore", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def post(meter, sealed, fuse, general=None):
    """What is told before a replay, and which way that went."""
    done = []

    def otherwise(_):
        done.append("general")
        (general or meter.before_replay)(sealed)

    quick.replaying(meter, sealed, fuse, Watched(), lambda _: done.append("short"), otherwise)(None)
    return done


class Device:
    """Stands for the model: what its routers decide, in passes with and without graphs."""

    def __init__(self, **options) -> None:
        self.capturing = False
        options = {"memory_limit": 64 << 20} | options
        self.meter = CudaMeter(range(LAYERS), EXPERTS, TOP_K, "softmax", is_capturing=lambda: self.capturing, **options)
        self.expected = torch.zeros((LAYERS, LAYOUT.width), dtype=torch.int64)
        self.memory, self.sealed = {}, {}
        self.meter.graphs.sealing = True
        torch.manual_seed(0)

    def decide(self, rows):
        logits = torch.randn(LAYERS, rows, EXPERTS)
        return logits, logits.topk(TOP_K).indices.to(torch.int32)

    @torch.inference_mode()
    def warm_up(self, rows, overwrite=False):
        self.meter.begin_dummy()
        logits, ids = self.decide(rows)
        for layer in range(LAYERS):
            self.meter.observe(layer, logits[layer], ids[layer], None, Span())
            if overwrite:
                logits[layer] += 1

    @torch.inference_mode()
    def capture(self, key, rows, span=Span(), pieces=((0, 1, 2),), memory=None):  # noqa: B008 - frozen
        """In graphs that hold those layers. What is launched while a graph is captured runs at its replays. ``memory``:
        where its decisions will lie.
        """
        self.meter.begin_dummy()
        self.capturing = True
        self.memory[key] = self.decide(rows) if memory is None else memory
        self.sealed[key] = []
        for layers in pieces:
            launched = []
            with self.recording(launched):
                for layer in layers:
                    self.meter.observe(layer, self.memory[key][0][layer], self.memory[key][1][layer], key, span)
                self.sealed[key].append((self.meter.graphs.end_capture(key), launched))
        self.capturing = False

    @contextlib.contextmanager
    def recording(self, launched):
        """What would be launched goes to ``launched`` as it does into a graph: in-graph capture is looked at apart."""
        kernels = [(self.meter._launcher, "launch"), (self.meter.graphs.mailbox, "fetch")]
        kernels = [(of, name) for of, name in kernels if of is not None]
        for of, name in kernels:
            run = getattr(of, name)
            setattr(of, name, lambda *args, run=run, **kwargs: launched.append(functools.partial(run, *args, **kwargs)))
        try:
            yield
        finally:
            for of, name in kernels:
                delattr(of, name)

    def run_graphs(self, key):
        for sealed, launched in self.sealed[key]:
            if sealed is not None:
                fuse = Fuse(logging.getLogger("test"))
                post(self.meter, sealed, fuse)
                assert not fuse.blown, fuse.status.reason
            for launch in launched:
                launch()

    def count(self, logits, ids, start, n):
        if n:
            part = slice(start, start + n)
            self.expected += accumulate(logits[:, part], ids[:, part], "softmax", LAYOUT)

    @torch.inference_mode()
    def replay(self, key, tokens, start=0):
        self.meter.graphs.after_capture()
        logits, ids = self.memory[key]
        fresh = self.decide(logits.shape[1])
        self.meter.begin_pass(tokens)
        logits.copy_(fresh[0])
        ids.copy_(fresh[1])
        self.run_graphs(key)
        self.count(logits, ids, start, tokens)
        return self.meter.end_pass(key, tokens)

    @torch.inference_mode()
    def dummy(self, key):
        """A replay that must not be counted, as of a rank without work."""
        self.meter.begin_dummy()
        self.run_graphs(key)

    @torch.inference_mode()
    def eager(self, tokens, rows=None, layers=range(LAYERS)):
        logits, ids = self.decide(rows or tokens)
        self.meter.begin_pass(tokens)
        for layer in layers:
            self.meter.observe(layer, logits[layer], ids[layer], None, Span())
        self.count(logits, ids, 0, tokens)
        return self.meter.end_pass(None, tokens)

    def check(self):
        difference = torch.from_numpy(self.meter.read_rows()) - self.expected
        # exp and log differ in their last bit between torch and the kernel: a unit of the fixed point per token
        for name in ("entropy_sum", "top1_sum", "mass_sum"):
            at = LAYOUT.at(name)
            assert (difference[:, at].abs() <= 2 * self.expected[:, LAYOUT.at("tokens")]).all()
            difference[:, at] = 0
        assert not difference.any()


@interpreted
def test_replays_and_passes_without_a_graph_add_up() -> None:
    device = Device()
    device.warm_up(32)
    device.meter.before_capture(rows=16)
    device.meter.graphs.sealing = False
    for key, rows in (("a", 16), ("b", 8)):
        device.warm_up(rows)
        device.capture(key, rows)
    device.check()
    assert sealed(device, "a") == sealed(device, "b") == [False]
    assert device.replay("a", 13) and device.replay("b", 8) and device.eager(20, rows=24) and device.replay("a", 1)
    assert device.meter.capture == "retain" and device.meter.passes == 4
    device.check()


@interpreted
def test_a_compilation_that_hangs_is_not_waited_for_without_end(monkeypatch) -> None:
    monkeypatch.setattr("moe_monitor.capture.cuda.PATIENCE", 0.05)
    device, ends = Device(), threading.Event()
    device.meter._compiling = hanging = threading.Thread(target=ends.wait, args=(60,), daemon=True)
    hanging.start()
    assert device.eager(5)
    device.check()
    assert hanging.is_alive()
    ends.set()


def test_a_compilation_that_fails_is_left_to_the_first_launch(monkeypatch, caplog) -> None:
    """Nothing is raised into the start, nor into the thread that nobody looks after."""

    def fail(**kernel):
        raise RuntimeError(f"no compiler for {kernel['experts']} experts")

    monkeypatch.setattr("moe_monitor.capture.ahead.compile_kernel", fail)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with caplog.at_level("DEBUG", "vllm.moe_monitor"):
        compiling = compile_beside(torch.device("cuda"), experts=8)
        compiling.join(10)
    assert not compiling.is_alive()
    assert "no compiler for 8 experts" in caplog.text


def sealed(device, key):
    return [graph is not None for graph, _ in device.sealed[key]]


@interpreted
def test_sealed_graphs_count_by_themselves() -> None:
    device = Device()
    device.warm_up(32)
    device.meter.before_capture(rows=16)
    device.capture("a", 16)
    device.capture("b", 8, pieces=((0,), (1,), (2,)))
    assert sealed(device, "a") == [True] and sealed(device, "b") == [False, False, True]
    device.check()
    told = []
    post = device.meter.graphs.mailbox.post
    device.meter.graphs.mailbox.post = lambda *args: (told.append(args), post(*args))
    for _ in range(3):
        assert device.replay("a", 13)
        device.dummy("b")
        device.dummy("a")
        assert device.replay("b", 8) and device.eager(20, rows=24) and device.replay("b", 1)
    assert device.replay("a", 16)
    assert [args[0] for args in told] == [13, 0, 0, 8, 1] * 3 + [16]
    assert device.meter.passes == 13
    device.check()


class Timed:
    """Passes with these numbers are timed."""

    clock, noting, sampling, scheduled = None, None, False, {}

    def __init__(self, *numbers):
        self.numbers, self.passes, self.soonest, self.ended = list(numbers), 0, 0, 0

    def begin(self, tokens):
        self.passes += 1
        self.sampling = self.passes in self.numbers
        self.soonest = next(number for number in [*self.numbers, 99] if number > self.passes)

    def stop(self):
        assert self.sampling is (self.passes in self.numbers)

    def end(self, key):
        self.ended += self.sampling
        self.sampling = False

    def dummy(self):
        assert not self.sampling


@interpreted
def test_the_hooks_of_a_worker_count_each_pass_once_on_every_way_through_them() -> None:
    pytest.importorskip("vllm")
    from moe_monitor.capture.vllm import runner_v2
    from moe_monitor.capture.vllm.context import Parallel
    from moe_monitor.capture.vllm.hooks import Hooks
    from moe_monitor.capture.vllm.wrapping import opaque_routing

    device = TracingDevice()
    capture = Hooks(Fuse(logging.getLogger("test")))
    capture.meter, capture.parallel = device.meter, Parallel(0, 1, 0, 1)
    device.warm_up(32)
    device.meter.before_capture(rows=16)
    device.capture("a", 16)
    device.capture("b", 8)
    device.meter._stream = object()  # as after the first pass on a GPU: passes may begin the short way
    capture.timing = timing = Timed(8, 13)
    runner = RunnerV2(lambda: None)
    runner_v2._patch_steps(runner, capture)
    short = []

    @torch.inference_mode()
    def step(key, tokens, scheduled=None, ran=None):
        logits, ids = device.memory[key] if key else device.decide(tokens)
        routers = [SimpleNamespace(_compute_routing=lambda _, logits, i=i: (None, ids[i])) for i in range(LAYERS)]
        routing = [opaque_routing(router, i, capture) for i, router in enumerate(routers)]
        short.append(device.meter.clean)
        runner._replays = lambda: run(key, logits, ids, routing)
        runner.prepared = SimpleNamespace(num_tokens=tokens)
        runner.execute_model(output(a=scheduled or tokens))
        device.count(logits, ids, 0, tokens)

    def run(key, logits, ids, routing):
        if key:
            for kept, fresh in zip(device.memory[key], device.decide(len(logits[0])), strict=True):
                kept.copy_(fresh)
            for graph, launched in device.sealed[key]:
                post(device.meter, graph, capture.fuse, capture.before_replay)
                for launch in launched:
                    launch()
        else:
            for layer in range(LAYERS):
                routing[layer](None, logits[layer])

    device.owners(0, -1, 2)
    for key, tokens in (("a", 3), ("a", 3), ("a", 3), (None, 3), ("a", 3), ("b", 3), ("b", 2), ("b", 2), (None, 1)):
        step(key, tokens)
    capture.begin_dummy()
    device.run_graphs("b")
    device.owners(4, 5, -1)
    for key, tokens in (("b", 3), ("b", 3), ("a", 3)):
        step(key, tokens)
    # the first, and those that come after one that was timed: all that most passes do without may have been done
    assert short == [False] + [True] * 7 + [False] + [True] * 3
    step("a", 3, scheduled=5)  # the model runner dropped two
    assert not capture.fuse.blown and device.meter.passes == 13
    assert (timing.passes, timing.ended, timing.sampling) == (13, 2, False)
    device.meter._stream = None  # what follows reads as without a GPU
    device.check()
    device.check_requests([0, 1, 2])
    device.meter._stream = object()
    capture.begin_pass(3, {"a": 3})
    post(device.meter, device.sealed["b"][0][0], capture.fuse, capture.before_replay)
    capture.end_pass(2)
    assert capture.fuse.blown and "3 tokens were counted in a graph" in capture.fuse.status.reason
    device.meter.pending[0] = "a decision of the pass in which that happened"
    device.meter.turn = 1
    capture.begin_pass(3, {"a": 3})
    assert not device.meter.pending and device.meter.turn == -1, "once it is off, nothing is held"
    capture.fuse = Fuse(logging.getLogger("test"))
    capture.batch_is("not what vLLM says it is")
    assert "num_tokens" in capture.fuse.status.reason


@interpreted
def test_a_router_that_fails_the_monitor_switches_it_off_and_nothing_else() -> None:
    pytest.importorskip("vllm")
    from moe_monitor.capture.vllm.context import Parallel
    from moe_monitor.capture.vllm.hooks import Hooks

    device = Device()
    capture = Hooks(Fuse(logging.getLogger("test")))
    capture.meter, capture.parallel = device.meter, Parallel(0, 1, 0, 1)
    logits, ids = device.decide(4)
    capture.observe_cuda(0, logits[0], ids[0])  # a warm-up pass
    device.meter.begin_pass(4)
    capture.observe_cuda(0, logits[0], ids[0])
    capture.observe_cuda(0, logits[0], ids[0])
    assert "layer 0 was routed twice in one pass" in capture.fuse.status.reason
    assert capture.fuse.status.errors == {"record": 1}
    capture.observe_cuda(0, None, None)  # not looked at any more


def test_a_piecewise_graph_is_named_where_somebody_asks(monkeypatch) -> None:
    from moe_monitor.capture.vllm import hooks

    asked = []
    monkeypatch.setattr(hooks, "graph_key", lambda: asked.append(True) or "key")
    capture = hooks.Hooks(Fuse(logging.getLogger("test")))
    capture.meter = CudaMeter(range(LAYERS), EXPERTS, TOP_K, "softmax", memory_limit=1 << 20)
    capture.meter._stream = object()  # as after the first pass on a GPU: passes may begin the short way
    for all_sealed, timed, named in [(True, None, False), (True, [], False), (True, [1], True), (False, None, True)]:
        capture.meter.graphs.all_sealed, capture.timing = all_sealed, None if timed is None else Timed(*timed)
        asked.clear()
        capture.begin_pass(3, {"a": 3})
        assert (capture.names_graphs, capture.replayed, bool(asked)) == (named, None, False)
        capture.note_graph()
        assert capture.replayed == "key" and asked
        assert not capture.meter.clean  # a pass that begins the short way would keep the name of the last one


@pytest.mark.skipif(kernels.triton is None, reason="needs Triton")
def test_the_fetch_that_is_compiled_beforehand_is_the_one_that_is_launched(monkeypatch) -> None:
    """Triton finds it again by the arguments' types and the constants."""
    from moe_monitor.capture import mailbox as module

    class Recorder:
        compiled = launched = ()

        def warmup(self, *arguments, grid):
            self.compiled = arguments

        def __getitem__(self, grid):
            return lambda *arguments: setattr(self, "launched", arguments)

    monkeypatch.setattr(module, "_fetch_kernel", recorder := Recorder())
    module.compile_fetch()
    with pytest.raises(module.DriverError, match="does not read the host's memory"):
        Mailbox(torch.device("cpu"), 8, 4, None)
    pointers, constants = 3, 2
    assert [tensor.dtype for tensor in recorder.launched[:pointers]] == list(recorder.compiled[:pointers])
    numbers = slice(pointers, -constants)
    wide = [[n >= 1 << 31 for n in arguments[numbers]] for arguments in (recorder.compiled, recorder.launched)]
    assert wide[0] == wide[1] == [True] * 3 + [False]
    assert recorder.compiled[-constants:] == recorder.launched[-constants:]


class Library:
    """Stands for libcuda: notes the calls, and answers with ``code``."""

    def __init__(self) -> None:
        self.calls, self.code = [], 0

    def __getattr__(self, name):
        def function(*arguments):
            if name == "cuGetErrorName":
                arguments[1]._obj.value = b"CUDA_ERROR_OF_A_KIND"
                return 0
            self.calls.append((name, *arguments))
            if name == "cuMemHostGetDevicePointer_v2":
                arguments[0]._obj.value = arguments[1] + 64
            return self.code

        self.__dict__[name] = function
        return function


def test_the_short_way_asks_the_driver_and_says_what_it_refuses(monkeypatch) -> None:
    from moe_monitor.capture import driver
    from moe_monitor.capture.sending import Sender

    library = Library()
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False)
    sender = Sender(driver.Driver(), torch.device("cuda", 3))
    sender.copy(16, 32, 8)
    place = torch.zeros(4)
    assert sender.address_of(place) == place.data_ptr() + 64
    assert [call[0] for call in library.calls] == ["cuMemcpyHtoDAsync_v2", "cuMemHostGetDevicePointer_v2"]
    assert library.calls[0][1:] == (16, 32, 8, 1003), "in the order of the device's current stream"
    library.code = 999
    with pytest.raises(driver.DriverError, match=r"cuMemcpyHtoDAsync_v2: CUDA_ERROR_OF_A_KIND \(999\)"):
        sender.copy(16, 32, 8)


def test_a_ring_keeps_what_was_sent_until_it_comes_round() -> None:
    from moe_monitor.capture.driver import DriverError

    elsewhere, nowhere = SimpleNamespace(address_of=lambda tensor: tensor.data_ptr() + 64), SimpleNamespace()
    nowhere.address_of = lambda tensor: (_ for _ in ()).throw(DriverError("not mapped"))
    for way, in_place in ((None, False), (elsewhere, False), (nowhere, False), (MemorySender(), True)):
        ring = Ring(torch.device("cpu"), 3, (5, 2), torch.int64, way)
        sent = []
        for n in range(3):
            ring.place()[2 * n : 2 * n + 4] = array("q", [n, n, n, -n])
            sent.append(ring.send(2 * n, 2 * n + 4))
        assert [place[n : n + 2].tolist() for n, place in enumerate(sent)] == [[[n, n], [n, -n]] for n in range(3)]
        assert (ring._host[1].data_ptr() == sent[0].data_ptr()) == in_place
        ring.place()[:2] = array("q", [7, 8])
        assert ring.send(0, 2).data_ptr() == sent[0].data_ptr() and sent[0][0].tolist() == [7, 8]
        assert sent[1][1].tolist() == [1, 1]


@interpreted
def test_whose_the_rows_are_is_written_down_when_it_has_changed_and_not_else() -> None:
    device = TracingDevice()
    device.warm_up(8)
    device.meter.before_capture(rows=8)
    device.capture("a", 8)
    written = []
    device.owners(0, -1, 3)
    assert device.replay("a", 3)
    written.append(device.meter.graphs.mailbox._place)
    assert device.replay("a", 3) and device.replay("a", 3)
    written.append(device.meter.graphs.mailbox._place)
    device.owners(0, -1, 3)  # another batch, as far as anybody knows
    assert device.replay("a", 3)
    written.append(device.meter.graphs.mailbox._place)
    device.owners(-1, -1, -1)
    assert device.replay("a", 3) and device.replay("a", 3)
    written.append(device.meter.graphs.mailbox._place)
    assert np.diff(written).tolist() == [0, 1, 0]
    device.check()
    device.check_requests([0, 1, 2])


def ready():
    """A device whose graphs, of up to 8 rows, are about to be captured."""
    device = Device()
    device.warm_up(8)
    device.meter.before_capture(rows=8)
    return device


def mailbox(rows=8):
    return Mailbox(torch.device("cpu"), rows, 4, None)


def quickly(box, tokens, owners=None):
    """Whether the short way posts that."""
    meter = SimpleNamespace(valid=tokens, clean=True, counted=None, tallies=SimpleNamespace(owners=owners))
    meter.before_replay = lambda _: None
    graph, fuse = SimpleNamespace(mailbox=box, whole=True), Fuse(logging.getLogger("test"))
    done = post(meter, graph, fuse)
    assert not fuse.blown and done == ["short" if meter.counted is graph else "general"]
    return done == ["short"]


@interpreted
def test_a_launch_fetches_what_was_posted_for_it_however_far_the_host_is_ahead() -> None:
    box, seen, posted = mailbox(1100), [], []
    random = np.random.default_rng(0)
    for turn in range(400):
        waiting = len(posted) - len(seen)
        if waiting < 30 and (not waiting or random.random() < 0.6):
            start, skip, n = random.integers(0, 40), random.integers(0, 40), int(random.integers(1, 1000))
            if random.random() < 0.3:
                assert quickly(box, n)
                posted.append((n, None))
            elif random.random() < 0.2:
                box.post(n)
                posted.append((n, None))
            elif random.random() < 0.3:
                # others come or go behind the traced ones
                owners = Owners(n + 9, [(4, 5, turn), (7, 9, 3)])
                assert not quickly(box, n + 10, owners)
                if turn % 2:
                    assert quickly(box, n, owners)
                else:
                    box.post(n, owners)
                posted.append((n, (0, owners.codes())))
                fewer = Owners(n + 3, owners.spans)
                assert quickly(box, n + 1, fewer) and not quickly(box, n + 4, fewer)
                posted.append((n + 1, (0, fewer.codes())))
            else:
                # before the shard, across its beginning, and far beyond its end; one row apart
                spans = [(0, skip, 1), (max(0, skip - 2), skip + n // 2, turn), (skip + n - 1, skip + n, turn + 1)]
                owners = Owners(skip + n, [span for span in spans if span[0] < span[1]])
                box.post(n, owners, start, skip)
                posted.append((n, (start, owners.codes()[skip:])))
        else:
            box.fetch()
            n, of = posted[len(seen)]
            assert box.head.tolist() == [n, of is not None]
            if of is not None:
                assert box.owners[of[0] : of[0] + n].tolist() == of[1][:n].tolist()
            seen.append(n)
    assert len(seen) > 150 and box.begun[0] == len(seen) + 1


@interpreted
def test_the_host_does_not_run_further_ahead_than_there_are_places(monkeypatch) -> None:
    monkeypatch.setattr("moe_monitor.capture.mailbox._PATIENCE", 0.05)
    box = mailbox()
    for n in range(32):
        box.post(n % 8)
    assert not quickly(box, 3)
    with pytest.raises(RuntimeError, match=r"32 replays of graphs were posted, and none has begun for 0\.05 s"):
        box.post(3)
    monkeypatch.setattr("moe_monitor.capture.mailbox._PATIENCE", 30.0)
    late = threading.Timer(0.2, box.fetch)
    late.start()
    box.post(5)  # waits for the device
    late.join()
    for n in (*range(1, 32), 5):
        box.fetch()
        assert box.head.tolist() == [n % 8, 0]


@interpreted
def test_a_launch_that_was_not_posted_is_noticed_at_the_next_post() -> None:
    box = mailbox()
    box.post(3)
    box.fetch()
    box.fetch()  # of whoever replays a graph behind the monitor's back
    assert not quickly(box, 3)
    with pytest.raises(RuntimeError, match="1 replays of graphs were not posted"):
        box.post(3)


@interpreted
def test_what_is_fetched_stays_within_the_rows_there_are() -> None:
    box = mailbox(8)
    around = torch.full((40,), -5, dtype=torch.int32)
    box.owners = around[:8]
    box.post(20, Owners(20, [(0, 20, 3)]))
    box.fetch()
    assert around.tolist() == [3] * 8 + [-5] * 32


@interpreted
def test_the_branch_begins_behind_what_was_captured_and_is_waited_for(monkeypatch) -> None:
    box, order = mailbox(), []

    class Stream:
        def __init__(self, name):
            self.name, self.device = name, "device"

        def wait_stream(self, other):
            order.append(f"{self.name} waits for {other.name}")

    main, box._side = Stream("main"), Stream("side")
    now = [main]

    @contextlib.contextmanager
    def on(stream):
        now.append(stream)
        try:
            yield
        finally:
            now.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    box.fetch = lambda: order.append(f"fetch on {now[-1].name}")
    with box.branch():
        order.append(f"count on {now[-1].name}")
    order.append(f"experts on {now[-1].name}")
    box.join()
    box.join()  # once is enough
    assert order == [
        "side waits for main",
        "fetch on side",
        "count on side",
        "experts on main",
        "main waits for side",
    ]
    with contextlib.suppress(RuntimeError), box.branch():
        raise RuntimeError("the launch failed")
    box.join()
    assert order[-1] == "main waits for side", "a branch that failed must be closed, too"


@interpreted
def test_more_tokens_than_are_attributed_are_refused() -> None:
    box = mailbox(100)
    with pytest.raises(ValueError, match="40 rows are attributed to requests, the router saw 41"):
        box.post(13, Owners(40, [(0, 1, 2)]), 0, 28)


@interpreted
def test_a_device_that_does_not_see_the_hosts_memory_is_counted_on_after_its_replays(monkeypatch, caplog) -> None:
    class Elsewhere(MemorySender):
        def __init__(self):
            super().__init__()
            self.spare = torch.full((4096,), 7, dtype=torch.int64)

        def address_of(self, tensor):
            return self.spare.data_ptr()

    device = Device()
    device.warm_up(8)
    device.meter.graphs._sender = Elsewhere()
    device.meter.before_capture(rows=8)
    assert "counts after the replays" in caplog.text and "does not read the host's memory" in caplog.text
    device.capture("a", 8)
    assert sealed(device, "a") == [False] and device.replay("a", 5)
    device.check()


@interpreted
def test_a_graph_is_sealed_only_where_the_end_of_its_capture_is_seen() -> None:
    device = ready()
    device.meter.graphs.sealing = False
    device.capture("a", 8)
    assert sealed(device, "a") == [False] and device.replay("a", 5)
    device.check()


@interpreted
def test_a_capture_that_ends_as_another_graph_is_noticed_and_left_in_order() -> None:
    device = ready()
    left, join = [], device.meter.graphs.mailbox.join
    device.meter.graphs.mailbox.join = lambda: (left.append(True), join())
    device.capturing = True
    logits, ids = device.decide(8)
    with device.recording([]):
        for layer in range(LAYERS):
            device.meter.observe(layer, logits[layer], ids[layer], "a", Span())
    with pytest.raises(RuntimeError, match="seen in another graph than 'b'"):
        device.meter.graphs.end_capture("b")
    assert left == [True] and device.meter.graphs.end_capture("a") is None


class MemorySender:
    """The way to a device that is this process's own memory."""

    def __init__(self) -> None:
        self.sent = []

    def copy(self, target: int, source: int, size: int) -> None:
        self.sent.append(size)
        ctypes.memmove(target, source, size)

    def address_of(self, tensor) -> int:
        return tensor.data_ptr()


def test_the_short_way_to_the_device_sends_what_torch_does_and_no_more() -> None:
    sender = MemorySender()
    by_torch, by_driver = (Control(torch.device("cpu"), 4, way) for way in (None, sender))
    for told in (7, 7, 30, 12, 0):
        for control in (by_torch, by_driver):
            control.tell(told)
        assert by_driver.head.tolist() == by_torch.head.tolist() == [told, 0]
    assert sender.sent == [8] * 4, "what has not changed is not sent"


def read_in_place(meter, places=16):
    """As on a GPU, whose kernels read the host's memory."""
    meter._ring = Ring(torch.device("cpu"), places, (len(meter.layers), 2), torch.int64, MemorySender())


def seen_by_routers(device, parallel, **context):
    """A worker's hooks, and what its routers do in a pass within vLLM's forward context."""
    from vllm.forward_context import CUDAGraphMode, override_forward_context

    from moe_monitor.capture.vllm.context import Parallel
    from moe_monitor.capture.vllm.hooks import Hooks
    from moe_monitor.capture.vllm.wrapping import opaque_routing

    capture = Hooks(Fuse(logging.getLogger("test")))
    capture.meter, capture.parallel = device.meter, Parallel(*parallel)
    read_in_place(device.meter)
    device.meter._stream = object()  # as after the first pass on a GPU: passes may begin the short way
    fields = {"ubatch_slices": None, "cudagraph_runtime_mode": CUDAGraphMode.NONE, "batch_descriptor": None}
    context = SimpleNamespace(**fields | {"dp_metadata": None} | context)

    @torch.inference_mode()
    def run(tokens, rows):
        logits, ids = device.decide(rows)
        routers = [SimpleNamespace(_compute_routing=lambda _, logits, i=i: (None, ids[i])) for i in range(LAYERS)]
        capture.begin_pass(tokens, {"a": tokens})
        with override_forward_context(context):
            for layer, router in enumerate(routers):
                opaque_routing(router, layer, capture)(None, logits[layer])
        capture.end_pass(tokens)
        return logits, ids

    return capture, run


@interpreted
@pytest.mark.parametrize("first", [0, 3])
def test_a_router_that_may_see_other_ranks_tokens_is_asked_whose_they_are(first) -> None:
    pytest.importorskip("vllm")
    device = Device()
    device.warm_up(8)
    sizes = [first, 5] if first else [5, 3]
    metadata = SimpleNamespace(num_tokens_across_dp_cpu=sizes)
    capture, run = seen_by_routers(device, (int(first > 0), 2, 0, 1), dp_metadata=metadata)
    for _ in range(2):
        device.count(*run(5, sum(sizes)), first, 5)
    assert not capture.fuse.blown, capture.fuse.status.reason
    device.meter._stream = None  # what follows reads as without a GPU
    device.check()


@interpreted
def test_a_split_pass_is_refused_by_its_first_router() -> None:
    pytest.importorskip("vllm")
    device = Device()
    device.warm_up(8)
    capture, run = seen_by_routers(device, (0, 1, 0, 1), ubatch_slices=["two", "halves"])
    run(5, 5)
    assert capture.fuse.blown and "dual-batch overlap" in capture.fuse.status.reason
    capture.begin_dummy()
    assert device.meter.turn == -1 and not device.meter.pending, "nothing is held once it is off"


def test_the_block_of_a_layer_is_found_behind_what_lora_puts_around_its_experts() -> None:
    from moe_monitor.capture.vllm.layers import parents_of

    class Module(torch.nn.Module):
        def __init__(self, **children):
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

    plain, wrapped, shared = Module(), Module(), Module()
    blocks = Module(experts=plain, gate=Module()), Module(experts=Module(base_layer=wrapped), gate=Module())
    other = Module(experts=Module(inner=shared))  # whatever it is, it is the model's own
    model = Module(layers=torch.nn.ModuleList([*blocks, other]))
    found = parents_of(model, [(0, plain), (1, wrapped), (2, shared)])
    assert found == [*blocks, other.experts]


def test_layers_that_route_other_ranks_prompts_are_not_monitored() -> None:
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    from moe_monitor.capture.vllm.layers import NothingToMonitor, facts_of

    router = type("Router", (BaseRouter,), dict.fromkeys(BaseRouter.__abstractmethods__))
    config = SimpleNamespace(pcp_size=2)
    layer = SimpleNamespace(layer_name="7", is_monolithic=False, router=router.__new__(router), moe_config=config)
    with pytest.raises(NothingToMonitor, match="layer 7 routes other ranks' tokens"):
        facts_of(layer)


@pytest.mark.parametrize(("layers", "experts", "in_place"), [(16, 64, 4096), (58, 256, 280)], ids=["OLMoE", "large"])
def test_whose_the_rows_are_is_read_in_place_where_few_programs_read(layers, experts, in_place) -> None:
    pytest.importorskip("triton")
    tallies, places = DeviceTallies(4, layers, experts), {}
    tallies.set_up(torch.device("cpu"), MemorySender())
    for n in (1, in_place, in_place + 1, 9000, 20_000, 12, 8192):
        spans = [(0, 1, 6), (n // 2, n // 2 + 1, 3), (n - n // 3, n, 1)]
        tallies.set_rows(Owners(n, [span for span in spans if span[0] < span[1]]))
        found = tallies.rows(0, 0, n)
        assert np.array_equal(found[:n].numpy(), tallies.owners.codes()), n
        assert tallies.rows(0, 0, n) is found, "sent once"
        places[n] = any(found.data_ptr() == place.data_ptr() for place in tallies._ring._host)
    assert [n for n, there in places.items() if there] == [1, in_place, 12]


@interpreted
@pytest.mark.parametrize("split", [None, lambda: False], ids=["others' tokens too", "alone"])
def test_a_pass_without_a_graph_is_counted_by_the_short_way_too(split) -> None:
    device, quickly = Device(), []
    device.warm_up(8)
    read_in_place(device.meter)
    device.meter._stream = object()  # as after the first pass on a GPU: passes may begin the short way

    def observe(layer, logits, ids, key, span):
        general = []

        def otherwise(_, logits):
            general.append(layer)
            device.meter.collect(layer, logits, ids, span)
            return None, ids

        quick.routing(device.meter, layer, lambda _, logits: (None, ids), otherwise, split)(None, logits)
        quickly.append(not general)

    launcher, collected = device.meter._launcher, []
    launch = launcher.launch
    launcher.launch = lambda *a, **k: (collected.append("strides" in k), launch(*a, **k))
    device.meter.observe = observe
    assert device.eager(5) and device.eager(3, rows=8) and device.eager(7)
    assert quickly == [split is not None, True, True] * 3
    assert collected == [True, False, False], "the first pass shows what forms the layers have"
    decide, device.decide = device.decide, lambda tokens: [strided(tensor) for tensor in decide(tokens)]
    assert device.eager(6)
    assert quickly[9:] == [split is not None, False, False], "the end of the pass looks how they lie"
    device.decide = decide
    assert device.eager(4)
    device.meter._stream, stream = None, device.meter._stream  # what follows reads as without a GPU
    device.check()
    device.meter._stream = stream
    quickly.clear()
    assert not device.eager(4, layers=(0, 2)), "a layer is missing"
    assert quickly == [split is not None, False], "what comes out of turn is left to the general hook"
    device.meter._pending_limit, device.meter.few = 100, 1  # each layer is counted by itself
    quickly.clear()
    assert device.eager(5) and quickly == [False] * 3
    with pytest.raises(RuntimeError, match="layer 0 was routed twice"):
        device.eager(5, layers=(0, 1, 2, 0))


@interpreted
def test_addresses_on_their_way_are_not_overwritten_where_every_layer_sends_its_own() -> None:
    layers, passes = 24, 4
    options = {"memory_limit": 64 << 20, "pending_limit": 1, "is_capturing": lambda: False}
    meter = CudaMeter(range(layers), EXPERTS, TOP_K, "softmax", **options)
    logits, ids = torch.randn(2, EXPERTS), torch.arange(2 * TOP_K, dtype=torch.int32).reshape(2, TOP_K)
    meter.observe(0, logits, ids, None, Span())  # a warm-up pass
    read_in_place(meter, len(meter._ring._places))
    launch, places = meter._launcher.launch, []
    meter._launcher.launch = lambda table, *args, **more: (
        places.append(table.data_ptr()),
        launch(table, *args, **more),
    )
    for _ in range(passes):
        meter.begin_pass(2)
        for layer in range(layers):
            meter.observe(layer, logits, ids, None, Span())
        assert meter.end_pass(None, 2)
    assert len(places) == len(set(places)) == layers * passes
    assert meter.layout.column(meter.read_rows(), "tokens").tolist() == [2 * passes] * layers


@interpreted
def test_tokens_that_the_runner_drops_are_not_counted_inside_a_graph_either() -> None:
    device = Device(forced="ingraph")
    device.warm_up(8)
    device.meter.before_capture(rows=16)
    device.meter.begin_pass(5)
    device.meter.set_valid(3)
    assert device.meter.graphs.control.head[0].item() == 3


@interpreted
def test_graphs_that_cannot_be_sealed_are_counted_after_their_replays() -> None:
    device = Device()
    device.warm_up(32)
    device.meter.before_capture(rows=8)
    device.capture("a", 16)  # larger than was said
    device.capture("b", 8, pieces=((0, 1), (2,)))
    # the end of a draft model's graph of the same name: no layer was seen in it
    assert device.meter.graphs.end_capture("b") is None
    assert sealed(device, "a") == [False] and sealed(device, "b") == [False, True]
    assert device.replay("a", 9) and device.replay("b", 2)
    device.check()


@interpreted
def test_a_graph_that_outlives_a_new_capture_still_has_what_its_kernel_reads() -> None:
    device = ready()
    device.capture("a", 8)
    assert device.replay("a", 4)
    ((old, launched),) = device.sealed["a"]
    device.meter.before_capture(rows=8)
    device.capture("b", 8)
    assert device.replay("b", 5)
    fetch, count = launched
    assert old.mailbox is not device.meter.graphs.mailbox
    assert fetch.func.__self__ is old.mailbox
    assert count.keywords["n_valid_device"].data_ptr() == old.mailbox.head.data_ptr()
    device.sealed["old"], device.memory["old"] = [(old, launched)], device.memory["a"]
    device.dummy("old")
    assert old.mailbox.head[0] == 0, "told by its own, so nothing is counted"
    assert device.replay("old", 3) and device.replay("b", 5)
    device.check()


@interpreted
def test_a_replay_of_a_sealed_graph_that_was_not_announced_is_noticed() -> None:
    device = ready()
    device.capture("a", 8)
    device.meter.begin_pass(4)
    with pytest.raises(RuntimeError, match="by other means"):
        device.meter.end_pass("a", 4)
    device.meter.begin_pass(4)
    device.run_graphs("a")
    with pytest.raises(RuntimeError, match="4 tokens were counted"):
        device.meter.end_pass("a", 3)


@interpreted
@pytest.mark.parametrize("sealing", [True, False])
def test_a_graph_captured_anew_replaces_the_old_one(sealing) -> None:
    device = Device()
    device.warm_up(8)
    device.capture("a", 8)
    device.meter.before_capture(rows=8)
    device.meter.graphs.sealing = sealing
    device.capture("a", 8)
    device.capture("a", 8)
    assert device.replay("a", 5)
    device.check()


@interpreted
def test_tokens_of_other_ranks_are_not_counted() -> None:
    device = Device()
    device.warm_up(8)
    device.capture("a", 16, Span(start=8, rows=8))
    assert device.replay("a", 5, start=8)
    device.check()
    assert Span(rows=4, skip=4).valid(3) == 0 and Span(rows=4, skip=4).valid(6) == 2 and Span(rows=4).valid(9) == 4


@interpreted
def test_a_missing_layer_is_noticed() -> None:
    device = Device()
    device.warm_up(8)
    assert not device.eager(4, layers=[0, 2])
    assert not device.meter.end_pass("never captured", 4)


def strided(tensor):
    """The same values, each token's further from the next one's."""
    wide = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + 8), dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


@interpreted
def test_decisions_are_read_where_they_lie_and_layers_of_other_forms_refused() -> None:
    device = Device()
    device.warm_up(8)

    def run(change):
        logits, ids = device.decide(6)
        given = [change(layer, *pair) for layer, pair in enumerate(zip(logits, ids, strict=True))]
        device.meter.begin_pass(6)
        for layer, pair in enumerate(given):
            device.meter.observe(layer, *pair, None, Span())
        device.meter.end_pass(None, 6)
        device.count(logits, ids, 0, 6)

    for _ in range(2):
        run(lambda layer, logits, ids: (logits, ids))
        run(lambda layer, logits, ids: (strided(logits), strided(ids)))
        device.check()
    others = [
        lambda layer, logits, ids: (strided(logits) if layer == 2 else logits, ids),
        lambda layer, logits, ids: (logits, strided(ids) if layer == 0 else ids),
    ]
    for change in others:
        with pytest.raises(RuntimeError, match="differ in form"):
            run(change)
    with pytest.raises(RuntimeError, match="do not lie side by side"):
        run(lambda layer, logits, ids: (logits.T.contiguous().T, ids))
    device.check()


@interpreted
@pytest.mark.parametrize("width", ["logits", "ids"])
def test_the_first_pass_shows_whether_layers_are_as_wide(width) -> None:
    device = Device()
    device.warm_up(8)
    logits, ids = device.decide(6)
    device.meter.begin_pass(6)
    for layer in range(LAYERS):
        pair = [logits[layer], ids[layer]]
        if layer == 1:
            pair[width == "ids"] = pair[width == "ids"][:, :3].contiguous()
        device.meter.observe(layer, *pair, None, Span())
    with pytest.raises(RuntimeError, match="differ in form"):
        device.meter.end_pass(None, 6)


@interpreted
def test_a_pass_larger_than_the_limit_is_worked_off_in_parts() -> None:
    device = Device(pending_limit=1)
    device.warm_up(8)
    assert device.eager(20)
    device.check()


@interpreted
def test_decisions_are_held_until_their_graph_is_captured_and_no_longer() -> None:
    """So that the graph captured next gets their memory."""
    device = ready()
    graphs, device.capturing = device.meter.graphs, True

    def decide(layer, key):
        pair = torch.randn(8, EXPERTS), torch.zeros((8, TOP_K), dtype=torch.int32)
        device.meter.observe(layer, *pair, key, Span())
        return [weakref.ref(tensor) for tensor in pair]

    def alive(decisions):
        return [tensor() is not None for tensor in decisions]

    with device.recording([]):
        first = [*decide(0, "a"), *decide(1, "a")]
        assert graphs.end_capture("a") is None, "a piece"
        first += decide(2, "a")
        assert alive(first) == [True] * 6
        assert graphs.end_capture("a") is not None
        assert alive(first) == [False] * 6
        graphs.sealing = False  # it will be counted after its replays: nothing in it may have their memory
        second = [reference for layer in range(LAYERS) for reference in decide(layer, "b")]
        assert graphs.end_capture("b") is None
        assert alive(second) == [True] * 6
        third = decide(0, "c")
        assert alive(second) == [False] * 6 and alive(third) == [True] * 2
        graphs.after_capture()
        assert alive(third) == [False] * 2
    assert graphs.complete("a") and graphs.complete("b") and not graphs.complete("c")
    assert graphs.retained_bytes == LAYERS * 8 * (16 * 4 + 4 * 4)


@interpreted
@pytest.mark.parametrize("sealing", [True, False])
def test_graphs_whose_decisions_lie_in_the_same_memory_are_counted_right(sealing) -> None:
    """The pieces of the second lie where the first has its decisions, and the third where both have."""
    device = Device()
    device.warm_up(16)
    device.meter.before_capture(rows=16)
    device.meter.graphs.sealing = sealing
    device.capture("a", 16)
    logits, ids = device.memory["a"]
    device.capture("b", 8, pieces=((0,), (1, 2)), memory=(logits[:, 4:12], ids[:, 4:12]))
    device.capture("c", 16, memory=(logits, ids))
    for key, tokens in [("a", 13), ("b", 8), ("c", 2), ("b", 3), ("a", 16), ("a", 1), ("c", 16)]:
        assert device.replay(key, tokens)
    assert device.meter.passes == 7
    device.check()


def overlapping(device):
    """Decisions of 8 tokens, of which each layer's logits have half of those of the layer before."""
    _, ids = device.decide(8)
    logits = torch.randn(16, EXPERTS)
    return logits.unfold(0, 8, 4).transpose(1, 2), ids


@interpreted
def test_what_is_wrong_with_a_graph_is_said_when_it_is_replayed() -> None:
    """Not before: vLLM captures graphs to see how much memory they take, too, before it is known how to count."""
    device = ready()
    device.meter.graphs.sealing = False
    device.capture("a", 8, memory=overlapping(device))
    device.capture("b", 8)
    assert device.replay("b", 5)
    device.check()
    with pytest.raises(RuntimeError, match="share memory"):
        device.replay("a", 5)


@interpreted
@pytest.mark.parametrize(("others", "capture"), [(0, "retain"), (8, "ingraph")])
def test_retaining_takes_what_routers_see_in_the_largest_graph(others, capture) -> None:
    """Also of other ranks' tokens, as there were in the largest warm-up pass."""
    device = Device(memory_limit=8 * 240)  # 3 layers, 16 logits and 4 ids of 4 bytes each: 240 a token
    for own, rows in ((8, 8 + others), (1, 64)):
        device.meter.begin_dummy()
        for layer, pair in enumerate(zip(*device.decide(rows), strict=True)):
            device.meter.observe(layer, *pair, None, Span(rows=own))
    device.meter.before_capture(rows=8)
    assert device.meter.capture == capture
    assert ("3,840 bytes, and MOE_MONITOR_DEVICE_MEMORY_MIB leaves 1,920" in device.meter.fallback) == bool(others)


@interpreted
def test_graphs_that_are_captured_on_another_stream_take_memory_of_their_own() -> None:
    from moe_monitor.capture.vllm.hooks import Hooks

    for streams, capture in ((1, "retain"), (2, "ingraph")):
        device, worker = Device(memory_limit=8 * 240), Hooks(Fuse(logging.getLogger("test")))
        worker.meter, worker.capture_streams = device.meter, streams
        device.warm_up(8)
        worker.before_capture(SimpleNamespace(cudagraph_capture_sizes=[1, 8, 4]))
        assert not worker.fuse.blown
        assert worker.fuse.status.capture == device.meter.capture == capture


@interpreted
@pytest.mark.parametrize("why", ["reuse", "memory", "forced"])
def test_where_retaining_is_not_possible_the_kernel_goes_into_the_graph(why) -> None:
    device = Device(memory_limit=1000 if why == "memory" else 64 << 20, forced="ingraph" if why == "forced" else "auto")
    device.warm_up(8, overwrite=why == "reuse")
    device.meter.before_capture(rows=16)
    assert device.meter.capture == "ingraph" and device.meter.fallback
    # the launch under capture reads the number of valid tokens on the device, where it is 0 now
    device.capture("z", 8, memory=overlapping(device))  # as where compiled code reuses their memory
    device.capture("a", 8)
    assert device.meter.graphs.retained_bytes == 0
    assert not device.meter.read_rows().any()
    device.meter.begin_pass(5)
    assert device.meter.graphs.control.head[0].item() == 5
    logits, ids = device.memory["a"]
    for layer in range(LAYERS):  # what the replayed graph does
        place = LAYERS + layer
        device.meter._launcher.launch(
            device.meter.graphs.control._table[place : place + 1],
            8,
            row_of=device.meter.graphs._row_of[layer : layer + 1],
            n_valid_device=device.meter.graphs.control.head,
        )
    assert device.meter.end_pass("a", 5)
    device.count(logits, ids, 0, 5)
    assert device.eager(3)
    device.check()


@interpreted
def test_retaining_by_force_fails_where_it_is_unsafe() -> None:
    device = Device(forced="retain")
    device.warm_up(8, overwrite=True)
    with pytest.raises(RuntimeError, match="reuses the memory"):
        device.meter.before_capture(rows=16)


class TracingDevice(Device):
    """Also tallies requests, and knows what the tallies must be."""

    def __init__(self, **options) -> None:
        self.tallies = DeviceTallies(3, LAYERS, EXPERTS)
        super().__init__(tallies=self.tallies, **options)
        self.by_request = kernels.Tallies.empty(3, LAYERS, EXPERTS, "cpu")

    def owners(self, *codes) -> None:
        self.codes = np.array(codes, dtype=np.int32)
        spans = [(at, at + 1, code) for at, code in enumerate(codes) if code >= 0]
        self.tallies.set_rows(Owners(len(codes), spans) if spans else None)

    def count(self, logits, ids, start, n):
        super().count(logits, ids, start, n)
        part = slice(start, start + n)
        codes = torch.from_numpy(self.codes[:n])
        kernels.tally_reference(logits[:, part], ids[:, part], "softmax", codes, self.by_request)

    def check_requests(self, slots) -> None:
        for slot, (counts, stats) in zip(slots, self.tallies.take(slots), strict=True):
            assert (counts == self.by_request.counts[slot].numpy()).all()
            difference = np.abs(stats - self.by_request.stats[slot].numpy())
            tokens = stats[:, :2].sum(1, keepdims=True)
            assert (difference[:, [0, 1, 6, 7]] == 0).all()
            assert (difference[:, 2:6] <= 2 * tokens).all()


@interpreted
@pytest.mark.parametrize(
    ("most", "shards"), [(0, False), (16, False), (16, True)], ids=["after the replay", "sealed", "shards too"]
)
def test_traced_requests_are_tallied_in_replays_and_without_graphs(most, shards) -> None:
    device = TracingDevice()
    device.meter.graphs.seals_shards = shards
    device.warm_up(8)
    device.meter.before_capture(rows=most)
    device.capture("a", 8)
    device.capture("b", 16, Span(start=8, rows=8))
    assert (sealed(device, "a"), sealed(device, "b")) == ([most > 0], [most > 0 and shards])
    device.owners(0, 0, -1, 2, 2)
    assert device.eager(5)
    device.owners(1, 3, -1)
    assert device.replay("a", 3)
    assert device.replay("a", 3)  # the same batch again: nothing is sent
    device.owners(-1, -1)
    assert device.replay("a", 2)
    device.owners(5, 4, 1)
    assert device.replay("b", 3, start=8)
    device.check()
    device.check_requests([0, 1, 2])
    assert not any(counts.any() for counts, _ in device.tallies.take([0, 1, 2])), "taking clears"
    device.by_request = kernels.Tallies.empty(3, LAYERS, EXPERTS, "cpu")
    device.owners(*[4] * 1500)  # more rows than were reserved
    assert device.eager(1500)
    device.check_requests([2, 0])


@interpreted
def test_no_requests_are_tallied_inside_the_graph() -> None:
    device = TracingDevice(forced="ingraph")
    device.warm_up(8)
    device.owners(0, 0)
    assert device.eager(2)
    device.check()
    assert not device.tallies.take([0])[0][0].any()
