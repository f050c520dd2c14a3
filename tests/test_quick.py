"""The short ways of the hooks: what they do alone, and what they leave to the general hooks.

That both count the same is shown in ``test_cuda_meter.py``, on every way through them.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from short_ways import Box, Capture, RunnerV1, RunnerV2, meter, output  # noqa: E402

from moe_monitor.capture import quick  # noqa: E402 - needs torch
from moe_monitor.capture.fuse import Fuse  # noqa: E402
from moe_monitor.capture.replays import Watched  # noqa: E402
from moe_monitor.capture.vllm import runner_v1, runner_v2  # noqa: E402


@pytest.fixture
def fuse() -> Fuse:
    return Fuse(logging.getLogger("test"))


@pytest.fixture(params=["v1", "v2"])
def patched(request, fuse):
    """A capture, and a model runner of its own that replays a graph which counts by itself."""

    def make(timing=None, **of):
        capture = Capture(fuse, meter(**of), timing or quick.Untimed())

        def replays() -> None:
            capture.meter.counted = "graph"

        seam, kind = (runner_v1, RunnerV1) if request.param == "v1" else (runner_v2, RunnerV2)
        runner = kind(replays)
        seam._patch_steps(runner, capture)
        return capture, runner

    yield make
    runner_v2._active = None


def test_a_pass_of_untraced_requests_needs_no_general_hook(patched) -> None:
    capture, runner = patched(timing=SimpleNamespace(passes=7, soonest=99), counted="the last graph")
    for _ in range(3):
        runner.execute_model(output(a=1, b=2))
    assert capture.said == [] and capture.timing.passes == 10
    assert (capture.meter.passes, capture.meter.valid, capture.meter.counted) == (3, 0, "graph")


def test_while_a_pass_runs_it_has_its_tokens(patched) -> None:
    capture, runner = patched()
    found = []
    runner._replays = lambda: found.append((capture.meter.valid, capture.meter.turn, capture.meter.counted))
    runner.execute_model(output(a=1, b=2))
    assert found == [(3, 0, None)]
    assert capture.said == [("end", 3)], "no graph has counted it"
    assert capture.meter.passes == 0


def test_a_model_that_runs_before_any_step_is_no_harm(fuse) -> None:
    capture = Capture(fuse, meter(clean=False))
    runner = RunnerV1(lambda: None)
    runner_v1._patch_steps(runner, capture)
    runner._model_forward()
    assert capture.said == [("pass", 0), ("end", 0)]


def test_requests_that_come_and_traced_ones_are_told(patched) -> None:
    capture, runner = patched()
    runner.execute_model(output("c", a=1, c=1))
    assert capture.said == ["step"] and capture.meter.passes == 1
    capture.live["a"] = object()
    runner.execute_model(output(a=1))
    assert [said if said == "step" else said[0] for said in capture.said] == ["step", "step", "rows"]
    assert capture.meter.passes == 2


@pytest.mark.parametrize(
    ("of", "timing"),
    [({"clean": False}, (0, 9)), ({}, (8, 9))],
    ids=["something is left of the pass before", "timed"],
)
def test_a_pass_that_is_not_as_most_are_begins_with_the_general_hook(patched, of, timing) -> None:
    capture, runner = patched(SimpleNamespace(passes=timing[0], soonest=timing[1]), **of)
    runner.execute_model(output(a=5))
    assert capture.said[0] == ("pass", 5)
    # which counts passes itself
    assert (capture.timing.passes, capture.meter.turn) == (timing[0], -1)


@pytest.mark.parametrize(
    "during",
    [
        lambda meter: setattr(meter, "clean", False),
        lambda meter: setattr(meter, "counted", None),
        lambda meter: setattr(meter, "valid", 2),
    ],
    ids=["routers were seen", "no graph counted", "some were dropped"],
)
def test_a_pass_that_no_graph_has_counted_ends_with_the_general_hook(patched, during) -> None:
    capture, runner = patched()

    def replays() -> None:
        capture.meter.counted = "graph"
        during(capture.meter)

    runner._replays = replays
    runner.execute_model(output(a=3))
    assert capture.said == [("end", 3)] and capture.meter.passes == 0


def test_a_batch_of_fewer_tokens_than_were_scheduled_ends_with_the_general_hook(fuse) -> None:
    capture = Capture(fuse, meter(), quick.Untimed())
    runner = RunnerV2(lambda: setattr(capture.meter, "counted", "graph"))
    batch = runner.prepared = SimpleNamespace(num_tokens=2)
    runner_v2._patch_steps(runner, capture)
    runner.execute_model(output(a=3))
    runner_v2._active = None
    assert capture.said == [("batch", batch), ("end", 2)] and capture.meter.passes == 0


def test_a_scheduler_that_says_other_things_switches_the_monitor_off(patched, fuse) -> None:
    capture, runner = patched()
    strange = SimpleNamespace(total_num_scheduled_tokens=3, num_scheduled_tokens={"a": 3})
    runner.execute_model(strange)
    assert fuse.blown and "scheduled_new_reqs" in fuse.status.reason
    runner.execute_model(strange)
    assert fuse.status.errors == {"requests": 1}, "once it is off, nothing is looked at"
    assert capture.meter.passes == 0


class Pass:
    """A worker's timing, and the hook that most passes do without."""

    def __init__(self, fuse, *, short) -> None:
        from moe_monitor.capture.clock import HostClock, Work
        from moe_monitor.capture.vllm.latency import Timing

        self.timing = Timing(SimpleNamespace(fuse=fuse, meter=None), [(0, None)], 5, Work(1), 8)
        self.timing.clock = HostClock(1, 5, Work(1), 8)
        self.general, self.timed = 0, []
        capture = Capture(fuse, meter(), self.timing)
        capture.begin_pass = self.begin
        self.meter, self._short = capture.meter, short
        self.runner = RunnerV1(lambda: setattr(self.meter, "counted", "graph"))
        runner_v1._patch_steps(self.runner, capture)

    def run(self) -> None:
        self.meter.clean = self._short
        self.runner.execute_model(output(a=3))

    def begin(self, tokens, scheduled) -> None:
        self.general += 1
        self.timing.begin(tokens)
        if self.timing.sampling:
            self.timed.append(self.timing.passes)
            self.timing.end(None)


def test_the_same_passes_are_timed_as_if_all_began_with_the_general_hook(fuse) -> None:
    pytest.importorskip("vllm")
    short, always = Pass(fuse, short=True), Pass(fuse, short=False)
    for _ in range(200):
        short.run()
        always.run()
    assert short.timed == always.timed and len(short.timed) > 20
    assert short.timing.passes == always.timing.passes == 200
    # the first, those that are timed, and the one after each
    assert short.general <= 2 * len(short.timed) + 1 < always.general == 200


@pytest.mark.parametrize("within", [False, True], ids=["between passes", "while one begins"])
def test_passes_are_short_again_once_timing_is_off(fuse, within) -> None:
    pytest.importorskip("vllm")
    passes = Pass(fuse, short=True)
    if within:
        passes.timing.clock.begin = lambda *_: passes.timing.fail(RuntimeError("the publisher's thread met this"))
    else:
        passes.timing.fail(RuntimeError("the publisher's thread met this"))
    for _ in range(100):
        passes.run()
    assert passes.general == int(within) and not passes.timing.sampling


class Torchs:
    """Stands for a graph: what its own replay does, and what is done otherwise."""

    def __init__(self, meter, graph, fuse, watched=None) -> None:
        self.done = []
        own = lambda _: self.done.append("replayed")  # noqa: E731
        otherwise = lambda _: self.done.append("otherwise")  # noqa: E731
        replay = quick.replaying(meter, graph, fuse, watched or Watched(), own, otherwise)
        self.replay = lambda: replay(self)


@pytest.mark.parametrize(
    ("of", "box", "whole", "blown"),
    [
        ({"valid": 0}, {}, True, False),
        ({"clean": False}, {}, True, False),
        ({"counted": "graph"}, {}, True, False),
        ({}, {"unsent": True}, True, False),
        ({}, {"posted": 33}, True, False),
        ({}, {"begun": [2]}, True, False),
        ({}, {}, False, False),
        ({}, {}, True, True),
    ],
    ids=["dummy", "routers were seen", "a second graph", "addresses", "far ahead", "unposted", "a shard", "off"],
)
def test_what_a_replay_needs_beyond_a_word_is_left_to_the_general_hook(fuse, of, box, whole, blown) -> None:
    mailbox = Box()
    mailbox.__dict__.update(box)
    graph, counting = SimpleNamespace(mailbox=mailbox, whole=whole), meter(**{"valid": 3, **of})
    fuse.blown, posted = blown, mailbox.posted
    torchs = Torchs(counting, graph, fuse)
    torchs.replay()
    assert torchs.done == ["otherwise"] and not any(mailbox.words) and mailbox.posted == posted
    assert counting.counted == of.get("counted")


def test_a_replay_is_posted_once_and_its_time_is_told(fuse) -> None:
    mailbox, counting = Box(), meter(valid=3)
    graph = SimpleNamespace(mailbox=mailbox, whole=True)
    torchs = Torchs(counting, graph, fuse)
    torchs.replay()
    assert (mailbox.words[1], mailbox.posted, counting.counted, torchs.done) == (3, 2, graph, ["replayed"])
    assert 0 < fuse.status.hook_seconds < 1
    torchs.replay()  # within the same pass
    assert torchs.done == ["replayed", "otherwise"] and mailbox.posted == 2


def test_a_failing_post_switches_the_monitor_off_and_the_graph_is_replayed_once(fuse) -> None:
    mailbox = Box()
    mailbox.begun = []
    torchs = Torchs(meter(valid=3), SimpleNamespace(mailbox=mailbox, whole=True), fuse)
    torchs.replay()
    assert fuse.blown and "IndexError" in fuse.status.reason and torchs.done == ["otherwise"]


def test_a_replay_that_fails_once_it_is_posted_is_told_of_and_raised(fuse) -> None:
    told = []

    def own(_):
        raise MemoryError("the device is full")

    graph = SimpleNamespace(mailbox=Box(), whole=True)
    replay = quick.replaying(meter(valid=3), graph, fuse, Watched(failed=told.append), own, pytest.fail)
    with pytest.raises(MemoryError, match="full"):
        replay("graph")
    assert [str(error) for error in told] == ["the device is full"]


class Routers:
    """Those of three layers. ``general``: which went the general way, and the layers that did."""

    def __init__(self, counting, **more) -> None:
        self.general = []
        self.layers = [quick.routing(counting, i, self._original, self._otherwise(i), **more) for i in range(3)]

    @staticmethod
    def _original(hidden, logits, scale=1):
        return f"weights {scale}", logits[:, :2].to(torch.int32).contiguous()

    def _otherwise(self, position):
        def compute(hidden, logits, **more):
            self.general.append(position)
            return self._original(hidden, logits, **more)

        return compute


def test_decisions_are_kept_in_their_turn_and_all_others_left_to_the_general_hook() -> None:
    counting = meter(turn=0)
    routers, a, b = Routers(counting), torch.ones(3, 4), torch.ones(3, 4)
    weights, chosen = routers.layers[0]("hidden", a)
    assert weights == "weights 1" and chosen.tolist() == [[1, 1]] * 3
    assert routers.general == [0], "where others' tokens may be seen, the general hook looks whose they are"
    counting.turn = 1
    weights, ids = routers.layers[1]("hidden", a, scale=2)
    assert weights == "weights 2"
    _, more = routers.layers[2]("hidden", b)
    assert counting.pending == {1: (a, ids, quick.WHOLE), 2: (b, more, quick.WHOLE)}
    assert counting.addresses == [0, 0, a.data_ptr(), ids.data_ptr(), b.data_ptr(), more.data_ptr()]
    assert routers.general == [0] and counting.turn == 3
    routers.layers[2]("hidden", a)
    counting.turn = -1
    routers.layers[1]("hidden", a)
    assert routers.general == [0, 2, 1] and len(counting.pending) == 2


def test_the_first_layer_of_a_small_pass_is_kept_as_well() -> None:
    counting = meter(turn=0, few=3)
    routers = Routers(counting, split=lambda: False)
    for layer in routers.layers:
        layer("hidden", torch.ones(3, 4))
    assert not routers.general and list(counting.pending) == [0, 1, 2] and counting.turn == 3
    assert not counting.clean, "a pass without a graph ends the general way"


@pytest.mark.parametrize(("few", "split"), [(2, lambda: False), (3, lambda: True), (3, lambda: 1 / 0)])
def test_the_first_layer_of_a_pass_that_is_large_split_or_unreadable_is_left_to_the_general_hook(few, split) -> None:
    counting = meter(turn=0, few=few)
    routers = Routers(counting, split=split)
    routers.layers[0]("hidden", torch.ones(3, 4))
    assert routers.general == [0] and counting.clean and not counting.pending and counting.turn == 0


@pytest.mark.parametrize("logits", [torch.ones(4, 3).T, "not a tensor"])
def test_a_decision_that_does_not_lie_side_by_side_is_looked_at_when_the_pass_ends(logits) -> None:
    counting = meter(turn=1)
    routers = Routers(counting)
    keeping = quick.routing(counting, 1, lambda *_: ("weights", torch.ones(3, 2)), pytest.fail)
    assert keeping("hidden", logits)[0] == "weights"
    assert counting.turn == -1 and counting.pending[1][0] is logits
    routers.layers[2]("hidden", torch.ones(3, 4))
    assert routers.general == [2]
