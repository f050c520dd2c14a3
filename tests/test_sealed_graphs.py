"""Graphs that count by themselves on a real GPU: the branch, the mailbox and replays that are watched.

The oracle adds up what each replay left behind, token by token, in torch. With vLLM's own graphs:
``benchmarks/gpu/exact.py``.
"""

from __future__ import annotations

import functools
import gc
import logging
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moe_monitor.capture import quick  # noqa: E402 - needs torch
from moe_monitor.capture.cuda import CudaMeter  # noqa: E402
from moe_monitor.capture.fuse import Fuse  # noqa: E402
from moe_monitor.capture.kernels import Tallies, tally_reference  # noqa: E402
from moe_monitor.capture.meter import accumulate  # noqa: E402
from moe_monitor.capture.replays import shorten, watch  # noqa: E402
from moe_monitor.capture.retained import Span  # noqa: E402
from moe_monitor.capture.tallies import DeviceTallies, Owners  # noqa: E402
from moe_monitor.layout import RowLayout  # noqa: E402

LAYERS, HIDDEN, EXPERTS, TOP_K, SLOTS = 4, 32, 64, 8, 6
SUMS = ("entropy_sum", "top1_sum", "mass_sum")


class Model:
    """Routers and something in the place of experts, which takes its time; captured in graphs of some sizes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.tallies = DeviceTallies(SLOTS, LAYERS, EXPERTS)
        self.meter = CudaMeter(range(LAYERS), EXPERTS, TOP_K, "softmax", memory_limit=64 << 20, tallies=self.tallies)
        self.gates = torch.randn(LAYERS, HIDDEN, EXPERTS, device="cuda") / HIDDEN**0.5
        self.graphs, self.inputs, self.addresses = {}, {}, {}
        self.pool = torch.cuda.graph_pool_handle()
        #: What was decided last, kept out of the graphs' memory: by layer logits, ids.
        self.decided = [
            (torch.zeros(32, EXPERTS, device="cuda"), torch.zeros((32, TOP_K), dtype=torch.int32, device="cuda"))
            for _ in range(LAYERS)
        ]
        self.fuse = Fuse(logging.getLogger("test"))

    def run(self, hidden, key):
        for layer in range(LAYERS):
            logits = hidden @ self.gates[layer]
            ids = logits.topk(TOP_K).indices.to(torch.int32)
            self.meter.observe(layer, logits, ids, key, Span())
            self.addresses.setdefault(key, []).extend((logits.data_ptr(), ids.data_ptr()))
            for kept, tensor in zip(self.decided[layer], (logits, ids), strict=True):
                kept[: len(tensor)].copy_(tensor)
            hidden = torch.tanh(hidden + logits @ self.gates[layer].T)
        return hidden

    def capture(self, rows):
        graph = torch.cuda.CUDAGraph()
        self.inputs[rows] = torch.randn(rows, HIDDEN, device="cuda")
        self.meter.begin_dummy()
        with torch.cuda.graph(graph, pool=self.pool):
            self.run(self.inputs[rows], rows)
            sealed = self.meter.graphs.end_capture(rows)
        self.graphs[rows] = graph
        assert (sealed is not None) == self.meter.graphs.sealing
        if sealed is None:
            return
        watched = watch(graph)
        watched.before = functools.partial(self.meter.before_replay, sealed)
        shorten(graph, functools.partial(quick.replaying, self.meter, sealed, self.fuse, watched))


def captured(sealing):
    with torch.inference_mode():
        model = Model()
        model.meter.begin_dummy()
        model.run(torch.randn(32, HIDDEN, device="cuda"), None)
        model.meter.before_capture(rows=32)
        model.meter.graphs.sealing = sealing
        for rows in (32, 8):
            model.capture(rows)
        model.meter.graphs.after_capture()
    assert model.meter.graphs.all_sealed == sealing
    return model


@pytest.fixture(scope="module")
def model():
    return captured(sealing=True)


@pytest.fixture(scope="module")
def unsealed():
    """Its graphs are counted after their replays."""
    return captured(sealing=False)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["model", "unsealed"])
def test_replays_ahead_of_the_device_are_counted_as_they_were_posted(which, request) -> None:
    model = request.getfixturevalue(which)
    layout, random = RowLayout(EXPERTS), np.random.default_rng(0)
    kept, owners = [], Owners(0, [])
    with torch.inference_mode():
        for turn in range(300):
            rows = (8, 32)[turn % 2]
            tokens = int(random.integers(1, rows + 1))
            if turn % 5 == 0 or owners.rows < tokens:
                spans = [
                    (at, at + 1, int(random.integers(0, 2 * SLOTS))) for at in range(tokens) if random.random() < 0.5
                ]
                owners = Owners(tokens, spans)
            if which == "unsealed" and turn % 8 == 0:
                torch.cuda.synchronize()  # these may be 16 passes ahead, as no server is
            traced = owners if turn % 7 else None
            model.tallies.set_rows(traced)
            if turn % 11 == 0:
                model.meter.begin_dummy()
                model.graphs[rows].replay()
                continue
            model.inputs[rows].copy_(torch.randn(rows, HIDDEN, device="cuda"))
            model.meter.begin_pass(tokens)
            model.graphs[rows].replay()
            assert model.meter.end_pass(rows, tokens)
            logits, ids = (torch.stack([pair[i][:tokens] for pair in model.decided]) for i in (0, 1))
            codes = None if traced is None else torch.from_numpy(traced.codes()[:tokens])
            kept.append((logits, ids, codes))
    expected, requests = np.zeros((LAYERS, layout.width), np.int64), Tallies.empty(SLOTS, LAYERS, EXPERTS, "cpu")
    for logits, ids, codes in kept:
        expected += accumulate(logits.cpu(), ids.cpu(), "softmax", layout).numpy()
        if codes is not None:
            tally_reference(logits.cpu(), ids.cpu(), "softmax", codes, requests)
    found = model.meter.read_rows()
    tokens = layout.column(expected, "tokens")
    assert (layout.column(found, "tokens") == tokens).all() and tokens.min() > 2000
    assert (layout.column(found, "experts") == layout.column(expected, "experts")).all()
    for name in SUMS:
        assert (np.abs(layout.column(found, name) - layout.column(expected, name)) <= 2 * tokens).all(), name
    for slot, (counts, stats) in enumerate(model.tallies.take(list(range(SLOTS)))):
        assert counts.sum() > 0
        assert (counts == requests.counts[slot].numpy()).all()
        assert (stats[:, :2] == requests.stats[slot, :, :2].numpy()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["model", "unsealed"])
def test_the_next_graph_gets_the_memory_of_decisions(which, request) -> None:
    """That it counts right nevertheless, the test before shows."""
    model = request.getfixturevalue(which)
    large, small = (sorted(model.addresses[rows]) for rows in (32, 8))
    assert len(set(large)) == len(set(small)) == 2 * LAYERS
    shortest = 32 * TOP_K * 4
    assert any(0 <= here - there < shortest for here in small for there in large)
    assert not any(graph.tensors for graph in model.meter.graphs.found.values())


@pytest.mark.gpu
def test_a_launch_that_was_not_posted_is_noticed_on_the_device_too(model) -> None:
    with torch.inference_mode():
        meter, graph = model.meter, model.graphs[8]
        watched = watch(graph)
        before, watched.before = watched.before, None
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
        watched.before = before
        meter.begin_pass(3)
        with pytest.raises(RuntimeError, match="were not posted"):
            graph.replay()


@pytest.mark.gpu
def test_a_watched_graph_is_kept_by_its_bound_replay_and_goes_with_it() -> None:
    graph, x, seen = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda"), []
    with torch.cuda.graph(graph):
        x += 1
    watch(graph).before = lambda: seen.append(True)
    assert isinstance(graph, torch.cuda.CUDAGraph) and "replay" not in vars(graph)
    kept = weakref.ref(graph)
    replay = graph.replay
    del graph
    gc.collect()
    replay()
    replay()
    assert x.item() == 2 and len(seen) == 2
    del replay
    gc.collect()
    assert kept() is None
