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


@pytest.mark.parametrize(
    ("of", "tokens"),
    [({"clean": False}, 3), ({"counted": None}, 3), ({}, 2)],
    ids=["routers were seen", "no graph counted", "some were dropped"],
)
def test_a_pass_that_no_graph_has_counted_ends_with_the_general_hook(of, tokens) -> None:
    counting, others = meter(**{"counted": "graph", "valid": 3, **of}), []
    quick.end_pass(counting, others.append)(tokens)
    assert others == [tokens] and (counting.passes, counting.valid) == (0, 3)
    assert counting.counted == of.get("counted", "graph")


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
