"""What is done at the replays of CUDA graphs, on classes that stand for torch's."""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from short_ways import Box  # noqa: E402

from moe_monitor.capture.cuda import CudaMeter  # noqa: E402
from moe_monitor.capture.fuse import Fuse  # noqa: E402
from moe_monitor.capture.replays import shorten, watch  # noqa: E402


class Graph:
    def __init__(self) -> None:
        self.done = []

    def replay(self) -> None:
        self.done.append("replay")


class Slotted:
    """One that cannot become another class."""

    __slots__ = ("__dict__", "__weakref__", "done")

    def __init__(self) -> None:
        self.done = []

    def replay(self) -> None:
        self.done.append("replay")


@pytest.mark.parametrize("kind", [Graph, Slotted])
def test_before_each_replay_and_in_its_stead(kind) -> None:
    graph, other, instead = kind(), kind(), [False, True, False]
    watch(graph).before = lambda: graph.done.append("before")
    graph.replay()
    watch(graph).instead = lambda: instead.pop(0)
    for _ in range(3):
        graph.replay()
    assert graph.done == ["before", "replay"] * 2 + ["before"] + ["before", "replay"]
    other.replay()
    assert other.done == ["replay"], "of this graph alone"
    assert isinstance(graph, kind)


class Stubborn(Graph):
    """One that stays of its class."""

    def __setattr__(self, name, value) -> None:
        if name == "__class__":
            raise TypeError("object layout differs")
        super().__setattr__(name, value)


@pytest.mark.parametrize("kind", [Graph, Slotted, Stubborn])
def test_a_watched_graph_may_have_a_replay_of_its_own(kind) -> None:
    graph, other, short = kind(), kind(), [True, False]
    for of in (graph, other):
        watch(of).before = lambda of=of: of.done.append("before")

    def replaying(own, otherwise):
        return lambda graph: own(graph) if short.pop(0) else otherwise(graph)

    shorten(graph, lambda own, otherwise: pytest.fail)
    shorten(graph, replaying)
    graph.replay()
    graph.replay()
    other.replay()
    watched = ["before", "replay"]
    # one that could not become of another class is watched as before
    assert (graph.done, other.done) == (["replay", *watched] if kind is not Stubborn else watched * 2, watched)
    assert isinstance(graph, kind) and watch(graph) is not watch(other)


def test_a_replay_that_fails_is_told_of_and_raised() -> None:
    class Broken(Graph):
        def replay(self) -> None:
            raise MemoryError("the device is full")

    graph, told = Broken(), []
    watch(graph).failed = told.append
    with pytest.raises(MemoryError, match="full"):
        graph.replay()
    assert [str(error) for error in told] == ["the device is full"]


def test_a_bound_replay_keeps_the_graph_and_nothing_else_does() -> None:
    """vLLM keeps no more of the segments of a breakable graph."""
    graph = Graph()
    there, done = weakref.ref(graph), graph.done
    watch(graph).before = lambda: done.append("before")
    replay = graph.replay
    del graph
    gc.disable()
    try:
        replay()
        assert done == ["before", "replay"]
        del replay
        assert there() is None
    finally:
        gc.enable()


def test_a_failed_replay_of_a_graph_that_counts_switches_the_monitor_off() -> None:
    from moe_monitor.capture.vllm.hooks import Hooks

    class Failing(Graph):
        def replay(self) -> None:
            super().replay()
            if len(self.done) > 2:
                raise RuntimeError("out of memory")

    capture, graph, box = Hooks(Fuse(logging.getLogger("test"))), Failing(), Box()
    capture.meter = meter = CudaMeter(range(2), 8, 2, "softmax", memory_limit=1 << 20)
    meter.clean, meter.valid = True, 3
    capture.watch_replays(graph, SimpleNamespace(mailbox=box, whole=True))
    graph.replay()
    assert box.words[1] == 3 and not capture.fuse.blown
    meter.counted = None
    graph.replay()
    meter.counted = None
    with pytest.raises(RuntimeError, match="out of memory"):
        graph.replay()
    assert capture.fuse.blown and "out of memory" in capture.fuse.status.reason


def test_the_end_of_a_capture_closes_what_is_open_before_torchs_own(monkeypatch) -> None:
    """Also with the fuse blown, and of graphs that nobody counts in."""
    from moe_monitor.capture.vllm import graphs

    order, captured = [], SimpleNamespace(mailbox=object())

    class Cuda(Graph):
        def capture_end(self) -> None:
            order.append("torch")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Cuda)
    monkeypatch.setattr(graphs, "graph_key", lambda: "key")
    meter = CudaMeter(range(2), 8, 2, "softmax", memory_limit=1 << 20)
    ends = iter([captured, None, RuntimeError("another graph")])

    def end_capture(key):
        order.append(key)
        found = next(ends)
        if isinstance(found, Exception):
            raise found
        return found

    meter.graphs.end_capture = end_capture
    capture = SimpleNamespace(fuse=Fuse(logging.getLogger("test")), timing=None, capturing=None, meter=meter)
    capture.watch_replays = lambda graph, sealed: setattr(watch(graph), "before", lambda: order.append(sealed))
    with graphs.capturing(capture):
        assert meter.graphs.sealing
        counted, plain = Cuda(), Cuda()
        counted.capture_end()
        plain.capture_end()
        assert order == ["key", "torch"] * 2 and not capture.fuse.blown
        Cuda().capture_end()
        assert order[-1] == "torch" and capture.fuse.blown, "a capture ends, whatever the monitor does"
    assert not meter.graphs.sealing
    order.clear()
    counted.replay()
    plain.replay()
    assert order == [captured] and counted.done == plain.done == ["replay"]
