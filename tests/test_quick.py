"""The short ways of the hooks: what they do alone, and what they leave to the general hooks.

That both count the same is shown in ``test_cuda_meter.py``, on every way through them.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from moe_monitor.capture import quick  # noqa: E402 - needs torch
from moe_monitor.capture.fuse import Fuse  # noqa: E402


@pytest.fixture
def fuse() -> Fuse:
    return Fuse(logging.getLogger("test"))


def output(new=(), scheduled=None):
    return SimpleNamespace(scheduled_new_reqs=list(new), num_scheduled_tokens=scheduled or {"a": 1})


def test_a_step_without_news_of_untraced_requests_needs_no_more_than_its_schedule(fuse) -> None:
    live, timing, others = {}, quick.Untimed(), []
    begin = quick.begin_step(live, timing, fuse, others.append)
    begin(output(scheduled={"a": 1, "b": 1}))
    assert timing.scheduled == {"a": 1, "b": 1} and others == []
    fresh = output(new=["c"])
    begin(fresh)
    live["a"] = object()
    plain = output()
    begin(plain)
    assert others == [fresh, plain]


def test_a_scheduler_that_says_other_things_switches_the_monitor_off(fuse) -> None:
    others = []
    quick.begin_step({}, quick.Untimed(), fuse, others.append)("not what vLLM says it is")
    assert fuse.blown and "scheduled_new_reqs" in fuse.status.reason
    assert others == ["not what vLLM says it is"]  # which returns on its first line


def test_once_the_monitor_is_off_nothing_is_looked_at_and_no_error_is_added(fuse) -> None:
    others, timing = [], quick.Untimed()
    begin = quick.begin_step({}, timing, fuse, others.append)
    begin("not what vLLM says it is")
    begin("nor this")
    begin(output(scheduled={"a": 1}))
    assert fuse.status.errors == {"requests": 1} and len(others) == 3 and timing.scheduled == {}


def meter(**of):
    return SimpleNamespace(**{"clean": True, "valid": 0, "counted": None, "passes": 0, "tallies": None, **of})


@pytest.mark.parametrize(
    ("of", "timing", "blown"),
    [({"clean": False}, (0, 9), False), ({}, (8, 9), False), ({}, (0, 9), True)],
    ids=["something is left of the pass before", "timed", "off"],
)
def test_a_pass_that_is_not_as_most_are_begins_with_the_general_hook(fuse, of, timing, blown) -> None:
    passes = SimpleNamespace(passes=timing[0], soonest=timing[1])
    others, counting = [], meter(counted="the last graph", **of)
    fuse.blown = blown
    quick.begin_pass(counting, passes, fuse, others.append)(5)
    # which counts passes itself
    assert others == [5] and (passes.passes, counting.valid, counting.counted) == (timing[0], 0, "the last graph")


def test_other_passes_begin_with_their_number_of_tokens(fuse) -> None:
    timing, counting, others = SimpleNamespace(passes=7, soonest=9), meter(counted="the last graph"), []
    quick.begin_pass(counting, timing, fuse, others.append)(5)
    assert others == [] and (timing.passes, counting.valid, counting.counted) == (8, 5, None)


class Pass:
    """A worker's timing, and the hook that most passes do without."""

    def __init__(self, fuse) -> None:
        from moe_monitor.capture.clock import HostClock, Work
        from moe_monitor.capture.vllm.latency import Timing

        self.meter, self.timed = meter(), []
        self.timing = Timing(SimpleNamespace(fuse=fuse, meter=None), [(0, None)], 5, Work(1), 8)
        self.timing.clock = HostClock(1, 5, Work(1), 8)
        self.general = 0

    def begin(self, tokens) -> None:
        self.general += 1
        self.meter.clean = True
        self.timing.begin(tokens)
        if self.timing.sampling:
            self.meter.clean = False
            self.timed.append(self.timing.passes)
            self.timing.end(None)


def test_the_same_passes_are_timed_as_if_all_began_with_the_general_hook(fuse) -> None:
    pytest.importorskip("vllm")
    short, always = Pass(fuse), Pass(fuse)
    begin = quick.begin_pass(short.meter, short.timing, fuse, short.begin)
    for _ in range(200):
        begin(3)
        always.begin(3)
    assert short.timed == always.timed and len(short.timed) > 20
    assert short.timing.passes == always.timing.passes == 200
    # the first, those that are timed, and the one after each
    assert short.general <= 2 * len(short.timed) + 1 < always.general


@pytest.mark.parametrize("within", [False, True], ids=["between passes", "while one begins"])
def test_passes_are_short_again_once_timing_is_off(fuse, within) -> None:
    pytest.importorskip("vllm")
    passes = Pass(fuse)
    begin = quick.begin_pass(passes.meter, passes.timing, fuse, passes.begin)
    if within:
        passes.timing.clock.begin = lambda *_: passes.timing.fail(RuntimeError("the publisher's thread met this"))
    else:
        passes.timing.fail(RuntimeError("the publisher's thread met this"))
    for _ in range(100):
        begin(3)
    assert passes.general == int(within) and not passes.timing.sampling


@pytest.mark.parametrize(
    ("of", "tokens"),
    [({"clean": False}, 3), ({"counted": None}, 3), ({}, 2)],
    ids=["routers were seen", "no graph counted", "some were dropped"],
)
def test_a_pass_that_no_graph_has_counted_ends_with_the_general_hook(fuse, of, tokens) -> None:
    counting, others = meter(**{"counted": "graph", "valid": 3, **of}), []
    quick.end_pass(counting, fuse, others.append)(tokens)
    assert others == [tokens] and (counting.passes, counting.valid) == (0, 3)
    assert counting.counted == of.get("counted", "graph")
    fuse.blown, counting = True, meter(counted="graph", valid=3)
    quick.end_pass(counting, fuse, others.append)(3)
    assert others == [tokens, 3] and counting.passes == 0


class Box:
    """A mailbox with a device that keeps up."""

    def __init__(self) -> None:
        self.words, self.begun, self.posted = [0] * 64, [1], 1
        self.unsent, self.spans, self.told = False, None, 0


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
    mailbox, others = Box(), []
    mailbox.__dict__.update(box)
    graph, counting = SimpleNamespace(mailbox=mailbox, whole=whole), meter(**{"valid": 3, **of})
    fuse.blown, posted = blown, mailbox.posted
    quick.before_replay(counting, graph, fuse, others.append)()
    assert others == [graph] and not any(mailbox.words) and mailbox.posted == posted
    assert counting.counted == of.get("counted")


def test_a_replay_is_posted_once_and_its_time_is_told(fuse) -> None:
    mailbox, counting, others = Box(), meter(valid=3), []
    graph = SimpleNamespace(mailbox=mailbox, whole=True)
    before = quick.before_replay(counting, graph, fuse, others.append)
    before()
    assert (mailbox.words[1], mailbox.posted, counting.counted, others) == (3, 2, graph, [])
    assert 0 < fuse.status.hook_seconds < 1
    before()  # within the same pass
    assert others == [graph] and mailbox.posted == 2


def test_a_failing_post_switches_the_monitor_off(fuse) -> None:
    mailbox, others = Box(), []
    mailbox.begun = []
    graph = SimpleNamespace(mailbox=mailbox, whole=True)
    quick.before_replay(meter(valid=3), graph, fuse, others.append)()
    assert fuse.blown and "IndexError" in fuse.status.reason and others == [graph]
