"""Traced requests without a server: who is sampled, whose rows are whose, and that nothing is kept for ever."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import random
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from boards import FakeWorker, identity, routed_rows
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from stretches import Stretches

from moe_monitor.board import BoardReader, BoardWriter, board_paths
from moe_monitor.cli.main import main
from moe_monitor.export.collector import MoeCollector
from moe_monitor.export.frontboard import FrontBoard, Quartiles
from moe_monitor.export.frontend import GATHER, MOST_FINISHED, MOST_RECORDS, POLL, POLL_SOON, Finished, FrontEnd
from moe_monitor.export.requests import FleetLoad, as_json, mean, overviews, recent, summarise
from moe_monitor.layout import FIXED_POINT, TALLY_COLUMNS
from moe_monitor.records import PATIENCE, Meta, RecordReader, RecordWriter, Tally, record_segments, short_id
from moe_monitor.snapshot import STATUS_SEGMENT, Status, read_engines, routing_segment

torch = pytest.importorskip("torch")

from moe_monitor.capture.fuse import Fuse  # noqa: E402
from moe_monitor.capture.publisher import HAND_OVER, Publisher, Reading  # noqa: E402
from moe_monitor.capture.requests import LOOK_FOR_LOST, LOST_AFTER, New, Tracer, chosen, wish  # noqa: E402
from moe_monitor.capture.tallies import HostTallies, slot_bytes  # noqa: E402

LAYERS, EXPERTS, TOP_K = 2, 8, 2


class Engine:
    """A tracer, its store, and a clock."""

    def __init__(self, slots: int = 4, ratio: float = 1.0) -> None:
        self.now = 0.0
        self.status = Status()
        self.store = HostTallies(slots, LAYERS, EXPERTS)
        self.tracer = Tracer(self.store, ratio, self.status, clock=lambda: self.now)

    def step(self, new=(), preempted=(), finished=(), scheduled=None) -> None:
        self.tracer.step(new, set(preempted), set(finished), scheduled or {})

    def forward(self, scheduled: dict[str, int], computed: list[int]) -> np.ndarray | None:
        """A pass; returns the codes of its rows."""
        tokens = sum(scheduled.values())
        self.tracer.rows(list(scheduled), tokens, scheduled, np.array(computed), total=tokens)
        logits = torch.randn(LAYERS, tokens, EXPERTS)
        self.store.add(logits, logits.topk(TOP_K).indices, "softmax", range(LAYERS))
        return None if self.owners is None else self.owners.codes()

    @property
    def owners(self):
        return self.store._owners


def new(name: str, prompt: int = 4, cached: int = 0, **extra_args) -> New:
    return New(name, prompt, cached, extra_args or None)


def tokens_of(tally: Tally) -> tuple[int, int]:
    (prefill,), (decode,) = (set(tally.stats[:, TALLY_COLUMNS.index(c)]) for c in ("prefill", "decode"))
    assert tally.counts.sum() == LAYERS * TOP_K * (prefill + decode)
    return int(prefill), int(decode)


# who is sampled


@pytest.mark.parametrize(
    ("value", "meant"),
    [(1, True), (0, False), ("1", True), ("0", False), (True, True), (" True ", True), ("false", False), (None, None)],
)
def test_the_requests_own_wish(value, meant) -> None:
    assert wish({"moe_trace": value, "other": 7}) is meant


@pytest.mark.parametrize("value", ["perhaps", "", 2, 0.5, -1, [1], {"a": 1}, math.nan])
def test_a_bad_wish_is_counted_and_ignored(value) -> None:
    engine = Engine(ratio=0.0)
    engine.step([new("a", moe_trace=value)])
    assert len(engine.tracer.live) == 0
    assert engine.status.dropped == {"bad_moe_trace": 1}
    always = Engine(ratio=1.0)
    always.step([new("a", moe_trace=value)])
    assert len(always.tracer.live) == 1


def test_the_wish_comes_before_chance() -> None:
    engine = Engine(ratio=0.0)
    engine.step([new("a", moe_trace=1), new("b")])
    assert len(engine.tracer.live) == engine.status.sampled == 1
    engine = Engine(ratio=1.0)
    engine.step([new("a", moe_trace=0)])
    assert len(engine.tracer.live) == 0


def test_which_requests_the_tracer_must_be_told_of() -> None:
    engine = Engine(ratio=0.0)
    assert not engine.tracer.concerns("a", None) and not engine.tracer.concerns("a", {"other": 1})
    for asked in (1, 0, "nonsense"):  # what is wrong is counted
        assert engine.tracer.concerns("a", {"moe_trace": asked})
    engine.step([new("a", moe_trace=1)])
    assert engine.tracer.concerns("a", None), "it is traced: resumed, or one more turn"
    assert engine.tracer.traces_any(["b", "a"]) and not engine.tracer.traces_any({"b"})
    engine.step(finished=["a"])
    assert not engine.tracer.concerns("a", None) and not engine.tracer.traces_any(["a"])
    assert Engine(ratio=1.0).tracer.concerns("a", None)


def test_chance_is_uniform_and_the_same_everywhere() -> None:
    ids = [f"cmpl-{i:x}-0-{i * 7919 % 99991:08x}" for i in range(20_000)]
    for ratio in (0.0, 0.01, 0.1, 0.5, 1.0):
        picked = sum(chosen(i, ratio) for i in ids)
        assert abs(picked - 20_000 * ratio) <= 4 * math.sqrt(20_000 * ratio * (1 - ratio))
    # A higher ratio only adds, and sequences of one request share their fate.
    few = {i for i in ids if chosen(i, 0.05)}
    assert few <= {i for i in ids if chosen(i, 0.1)}
    assert all(chosen(f"{n}_{i}", 0.05) == (i in few) for i in ids[:200] for n in (0, 1, 12))
    # The same on every rank, whatever machine it runs on. (By a CRC-32 bit by bit: 0.38, 0.93, 0.03, 0.47, 0.71.)
    fixed = [chosen(i, 0.5) for i in ("cmpl-8-0-deadbeef", "b", "a", "chatcmpl-1", "\u00e9")]
    assert fixed == [True, False, True, True, False]


@pytest.mark.parametrize("form", ["{}", "r{}", "{:032x}", "cmpl-bench-3fa4c1d2-{}-0", "{}-abcdefgh-12345678"])
def test_ids_that_are_numbers_in_a_row_are_chosen_one_by_one(form: str) -> None:
    """As many pairs of neighbours as chance has it, at 5 standard deviations."""
    n = 20_000
    for ratio in (0.05, 0.1, 0.5):
        picked = [chosen(form.format(i), ratio) for i in range(n)]
        assert abs(sum(picked) - n * ratio) <= 5 * math.sqrt(n * ratio)
        for apart in (1, 2, 10):
            both = sum(a and b for a, b in zip(picked, picked[apart:], strict=False))
            assert abs(both - n * ratio**2) <= 5 * math.sqrt(n * ratio**2)


# life


def test_rows_belong_to_their_requests_by_phase() -> None:
    engine = Engine()
    engine.step([new("a", 5), new("b", 3), new("c", 9, moe_trace=0)])
    codes = engine.forward({"a": 4, "c": 2, "b": 3}, [0, 0, 0])
    assert codes.tolist() == [0, 0, 0, 0, -1, -1, 2, 2, 2]
    engine.step(scheduled={"a": 3})
    assert engine.forward({"c": 1, "a": 3, "b": 1}, [2, 4, 3]).tolist() == [-1, 0, 1, 1, 3]  # speculative tokens decode
    engine.step(finished=["a", "b"])
    a, b = engine.tracer.drain(10)
    assert {a.meta.id: tokens_of(a), b.meta.id: tokens_of(b)} == {"a": (5, 2), "b": (3, 1)}


def test_a_steady_batch_is_attributed_once() -> None:
    engine = Engine()
    engine.step([new("a", 2), new("b", 2)])
    engine.forward({"a": 2, "b": 2}, [0, 0])
    engine.step()
    assert engine.forward({"a": 1, "b": 1}, [2, 2]).tolist() == [1, 3]
    first = engine.owners
    engine.step()
    assert engine.forward({"a": 1, "b": 1}, [3, 3]).tolist() == [1, 3] and engine.owners is first
    engine.step(preempted=["b"])
    assert engine.forward({"a": 1}, [4]).tolist() == [1]
    engine.step([new("c", 1)])
    assert engine.forward({"a": 1, "c": 1}, [5, 0]).tolist() == [1, 4]
    engine.step()
    assert engine.forward({"a": 1, "c": 1}, [6, 1]).tolist() == [1, 5]


def test_rows_that_stay_where_they_are_keep_their_list_of_spans() -> None:
    """That they need not be sent again is told by it."""
    engine = Engine()
    engine.step([new("a", 1), new("u", 1, moe_trace=0), new("b", 1)])
    engine.forward({"a": 1, "u": 1, "b": 1}, [0, 0, 0])
    engine.step()
    engine.forward({"a": 1, "u": 1, "b": 1}, [1, 1, 1])
    spans = engine.owners.spans
    engine.step([new("v", 1, moe_trace=0)])
    assert engine.forward({"a": 1, "v": 1, "b": 1, "w": 1}, [2, 0, 2, 0]).tolist() == [1, -1, 3, -1]
    assert engine.owners.spans is spans
    engine.step()
    assert engine.forward({"a": 1, "b": 1}, [3, 3]).tolist() == [1, 3]
    assert engine.owners.spans is not spans


def test_a_further_turn_of_a_session_is_a_prompt_again() -> None:
    engine = Engine()
    engine.step([new("a", 1), new("b", 1)])
    for position in range(2):
        codes = engine.forward({"a": 1, "b": 1}, [position, position])
    assert codes.tolist() == [1, 3]
    engine.step([new("b", 5)])
    assert engine.forward({"a": 1, "b": 3}, [2, 2]).tolist() == [1, 2, 2, 2]


def test_a_request_that_is_set_back_is_in_its_prompt_again() -> None:
    """As when loading its cached keys has failed: nobody says so but the positions."""
    engine = Engine()
    engine.step([new("a", 4), new("b", 1)])
    engine.forward({"a": 4, "b": 1}, [0, 0])
    for position in range(2):
        assert engine.forward({"a": 1, "b": 1}, [4 + position, 1 + position]).tolist() == [1, 3]
    assert engine.forward({"a": 6, "b": 1}, [0, 3]).tolist() == [0, 0, 0, 0, 1, 1, 3]
    assert engine.forward({"a": 1, "b": 1}, [6, 4]).tolist() == [1, 3]


def test_a_request_that_was_given_up_is_nobodys_if_it_comes_again() -> None:
    engine = Engine()
    engine.step([new("a", 1), new("b", 1)])
    for position in range(2):
        engine.forward({"a": 1, "b": 1}, [position, position])
    engine.now = LOST_AFTER + 1
    engine.step(scheduled={"a": 1})
    assert engine.forward({"a": 1, "b": 1}, [2, 2]).tolist() == [1, -1]


def test_a_traced_request_that_has_waited_is_attributed_when_its_turn_comes() -> None:
    engine = Engine()
    engine.step([new("a", 1), new("b", 1)])
    for position in range(3):
        assert engine.forward({"a": 1}, [position]).tolist() == [int(position > 0)]
        engine.step()
    assert engine.forward({"a": 1, "b": 1}, [3, 0]).tolist() == [1, 2]
    engine.step()
    assert engine.forward({"a": 1, "b": 1}, [4, 1]).tolist() == [1, 3]
    engine.step()
    assert engine.forward({"b": 1}, [2]).tolist() == [3], "a has to wait, and b is where it was"
    engine.step()
    assert engine.forward({"u": 1, "b": 2}, [9, 3]).tolist() == [-1, 3, 3]


def test_a_pass_without_traced_requests_has_no_attribution() -> None:
    engine = Engine(ratio=0.0)
    engine.step([new("a")])
    assert engine.forward({"a": 4}, [0]) is None
    engine.step([new("b", moe_trace=1)])
    assert engine.forward({"a": 1}, [4]) is None


def test_preempted_and_resumed_requests_stay_one() -> None:
    engine = Engine()
    engine.step([new("a", 4, cached=1)])
    engine.forward({"a": 3}, [1])
    engine.step()
    engine.forward({"a": 1}, [4])
    engine.step(preempted=["a", "unknown"])
    engine.step([new("a", 4)])  # model runner V2 gets it as new
    assert engine.forward({"a": 5}, [0]).tolist() == [0, 0, 0, 0, 1]
    engine.step(finished=["a"])
    (tally,) = engine.tracer.drain(10)
    assert (tally.meta.preemptions, tally.meta.cached_tokens, tokens_of(tally)) == (1, 1, (7, 2))
    assert engine.status.sampled == 1


def test_aborted_before_its_first_pass() -> None:
    engine = Engine()
    engine.step([new("a")])
    engine.step(finished=["a", "never seen"])
    (tally,) = engine.tracer.drain(10)
    assert tokens_of(tally) == (0, 0)
    assert len(engine.tracer.live) == 0


def test_what_is_over_the_cap_is_dropped_and_slots_come_back() -> None:
    engine = Engine(slots=2)
    engine.step([new(name) for name in "abcd"])
    assert (len(engine.tracer.live), engine.status.dropped) == (2, {"traced_requests": 2})
    engine.forward(dict.fromkeys("abcd", 4), [0] * 4)
    engine.step(finished="abcd")
    engine.step([new("e")])
    assert len(engine.tracer.live) == 0, "a slot is not free before it has been read"
    assert len(engine.tracer.drain(1)) == 1
    assert len(engine.tracer.drain(10)) == 1
    engine.step([new("f", 2)])
    engine.forward({"f": 2}, [0])
    engine.step(finished=["f"])
    (tally,) = engine.tracer.drain(10)
    assert tokens_of(tally) == (2, 0), "the slot was not cleared"


def test_where_tracing_is_not_possible_only_wishes_count_as_dropped() -> None:
    engine = Engine()
    engine.tracer._possible = lambda: False
    engine.step([new("a"), new("b", moe_trace=1), new("c", moe_trace=0)])
    assert (len(engine.tracer.live), engine.status.sampled) == (0, 0)
    assert engine.status.dropped == {"traced_requests": 1}


def test_lost_requests_are_given_up() -> None:
    engine = Engine(slots=2)
    engine.step([new("lost"), new("slow")])
    for _ in range(int(LOST_AFTER / LOOK_FOR_LOST) + 2):
        engine.now += LOOK_FOR_LOST
        engine.step(scheduled={"slow": 1})
    assert len(engine.tracer.live) == 1
    assert engine.status.dropped == {"lost_requests": 1}
    assert engine.tracer.drain(10) == []
    engine.step([new("a")])
    assert len(engine.tracer.live) == 2, "its slot was not freed"


def test_rows_that_do_not_add_up_are_nobodys() -> None:
    engine = Engine()
    engine.step([new("a")])
    for ids, tokens, scheduled, total in [
        (["a"], 3, {"a": 4}, 4),
        (["a"], 1, {"a": 2}, 2),
        (["a"], 4, {"a": 5}, 4),  # the scheduler contradicts itself
        (["a", "b"], 4, {"a": 2, "b": 1}, 4),
    ]:
        engine.tracer.rows(["a"], 1, {"a": 1}, np.array([0]), total=1)
        assert engine.owners is not None
        engine.tracer.rows(ids, tokens, scheduled, np.array([0, 0]), total=total)
        assert engine.owners is None
    assert engine.status.dropped == {"unattributed_passes": 4}


def test_ten_thousand_requests_leave_nothing_behind() -> None:
    engine = Engine(slots=8)
    for i in range(2500):
        batch = [f"r{4 * i + j}" for j in range(4)]
        engine.step([new(b, 1) for b in batch])
        engine.tracer.rows(batch, 4, dict.fromkeys(batch, 1), np.zeros(4), total=4)
        engine.step(finished=batch)
        assert len(engine.tracer.drain(100)) == 4
    assert len(engine.tracer.live) == 0
    assert not engine.tracer.pending
    assert len(engine.tracer._free) == 8
    assert engine.status.dropped == {}


# hand-over


def tally(name: str, tokens: int = 8, layers: int = 4, experts: int = 64, seed: int = 0, top_k: int = 8) -> Tally:
    counts = np.zeros((layers, 2, experts), dtype=np.int32)
    rows = routed_rows(layers, experts, top_k, tokens, seed)
    counts[:, 0] = rows[:, :experts]
    stats = np.zeros((layers, 8), dtype=np.int64)
    stats[:, 0] = tokens
    stats[:, 2:6] = np.array([0.5 * tokens, 0.25, 0.125 * tokens, 0.5 * tokens]) * FIXED_POINT
    return Tally(Meta(name, tokens, 0, 0, time.time() - 1, time.time()), counts, stats)


class Worker:
    """A board with records, as the publisher makes it."""

    def __init__(self, directory, name="rank-0", **facts) -> None:
        self.facts = identity(**facts)
        layers, experts = len(self.facts["layers"]), self.facts["experts"]
        segments = {
            "status": STATUS_SEGMENT,
            "routing": routing_segment(layers, routed_rows(1, experts, 1, 1).shape[1]),
        }
        segments |= record_segments(layers, experts)
        self.board = BoardWriter(directory, name, self.facts, segments)
        self.board.write("status", {"json": Status(active=True, reason="").to_array()})
        self.board.write("routing", {"rows": routed_rows(layers, experts, 8, 1000), "passes": np.array([1])})
        self.writer = RecordWriter(self.board, segments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.board.close()


def test_a_worker_hands_over_when_it_is_idle_when_it_is_time_and_when_slots_run_short(tmp_path) -> None:
    """Asked by hand, as the publisher's thread does every 0.4 s."""
    requests = SimpleNamespace(pending=False, pressing=False, drained=[])

    def drain(limit):
        requests.drained.append(limit)
        requests.pending = False
        return []

    requests.drain = drain
    rows = routed_rows(4, 64, 8, 10)
    source = SimpleNamespace(passes=0, read=lambda: Reading(rows, 0))
    fuse = Fuse(logging.getLogger("test"))
    publisher = Publisher(
        tmp_path / "run",
        "rank-0",
        identity(),
        fuse,
        source,
        interval=60.0,
        log_interval=0,
        logger=logging.getLogger("test"),
    )
    publisher.close()
    publisher._requests = requests
    due: list[int] = []
    for look in range(20):
        source.passes += look < 12 or look > 14  # no pass in the looks 12 to 14
        requests.pending = look not in (0, 13)
        requests.pressing = look == 18
        if publisher.has_gathered(HAND_OVER * look):
            due.append(look)
            requests.drain(0)
            publisher._empty_at = HAND_OVER * look
    assert due == [5, 10, 12, 14, 18]
    publisher._empty_at, now = 100.0, 100.0
    for i in range(12):  # as where the publishing interval wakes the thread in between, and a pass takes 0.15 s
        now += 0.05 if i % 2 else 0.1
        source.passes += i % 2 == 0
        requests.pending = True
        assert not publisher.has_gathered(now), "no pass has ended since a moment ago, but it is not idle"
    publisher._records = SimpleNamespace(at_once=5, write=lambda finished: None)
    publisher.hand_over()
    requests.pending, source.passes = True, 100
    assert requests.drained[5:] == [5]
    assert not publisher.has_gathered(time.monotonic()), "what comes now is gathered anew"


def test_slots_press_when_a_quarter_waits_or_is_all_that_is_free() -> None:
    engine = Engine(slots=8)
    engine.step([new(name) for name in "abcde"])
    assert not engine.tracer.pressing, "nobody waits"
    engine.step(finished="a")
    assert not engine.tracer.pressing
    engine.step(finished="b")
    assert engine.tracer.pressing, "a quarter waits"
    engine.tracer.drain(1)
    assert not engine.tracer.pressing
    engine.step([new("f"), new("g")])
    assert engine.tracer.pressing, "one waits, and two are free"
    engine.tracer.drain(1)
    assert not engine.tracer.pressing


def test_records_arrive_once_and_in_order(tmp_path) -> None:
    directory = tmp_path / "run"
    reader = RecordReader(directory)
    assert reader.poll() == []
    with Worker(directory) as worker:
        worker.writer.write([tally("a"), tally("b", tokens=3)])
        a, b = reader.poll()
        assert (a.meta.id, b.meta.id, a.engine, a.layers) == ("a", "b", "0", (0, 1, 2, 3))
        assert np.array_equal(b.counts, tally("b", tokens=3).counts)
        assert reader.poll() == []
        worker.writer.write([tally("c")])
        assert [r.meta.id for r in reader.poll()] == ["c"]
        assert reader.missed == 0
    assert reader.poll() == []
    reader.close()


def test_overwritten_records_are_counted(tmp_path) -> None:
    with Worker(tmp_path / "run") as worker:
        reader = RecordReader(tmp_path / "run")
        n = record_segments(4, 64)["request"].copies
        worker.writer.write(tally(f"r{i}") for i in range(n + 5))
        assert len(reader.poll()) == n
        assert reader.missed == 5
        reader.close()


@pytest.mark.parametrize(("layers", "experts"), [(4, 8), (58, 256)])
def test_a_reader_that_is_two_rounds_late_misses_nothing(tmp_path, layers, experts) -> None:
    """A server that is busy with answers looks at the board later than it means to."""
    with Worker(tmp_path / "run", layers=tuple(range(layers)), experts=experts) as worker:
        reader = RecordReader(tmp_path / "run")
        reader.poll()
        records, seen = (tally(f"r{i}", layers=layers, experts=experts) for i in range(10_000)), 0
        for _ in range(2):
            for _ in range(3):
                worker.writer.write(itertools.islice(records, worker.writer.at_once))
            seen += len(reader.poll())
        assert (seen, reader.missed) == (6 * worker.writer.at_once, 0)
        reader.close()


def test_a_burst_of_requests_does_not_keep_the_event_loop_waiting(tmp_path, monkeypatch) -> None:
    """All that a board holds, of a large model, at once: milliseconds each, and Python's lock is offered in between.

    In processor time of the matching thread, so that a busy machine does not matter.
    """
    stretches = Stretches()
    front = front_end(tmp_path / "run")
    with Worker(tmp_path / "run", layers=tuple(range(58)), experts=256) as worker:
        n = 3 * worker.writer.at_once
        worker.writer.write(tally(f"r{i}", layers=58, experts=256) for i in range(n))
        for i in range(n):
            finish(front, f"r{i}", at=1.0)
        monkeypatch.setattr("moe_monitor.gil.let_others", stretches.pause)
        stretches.begin()
        front.match(1.0)
        whole = stretches.end()
    assert len(front._finished) == len(front._records) == 0
    assert max(stretches.found) < 0.010 < whole
    front._board.close()


def test_pipeline_stages_are_put_together(tmp_path) -> None:
    directory = tmp_path / "run"
    reader = RecordReader(directory, patience=1.5)
    with Worker(directory, "s0", layers=(0, 1)) as first, Worker(directory, "s1", layers=(2, 3)) as second:
        first.writer.write([tally("a", layers=2)])
        assert reader.poll(now=10.0) == []
        second.writer.write([tally("a", layers=2, seed=1)])
        (record,) = reader.poll(now=10.4)
        assert record.layers == (0, 1, 2, 3)
        first.writer.write([tally("b", layers=2)])
        assert reader.poll(now=11.0) == []
        (part,) = reader.poll(now=12.6)  # the other stage dropped it
        assert part.layers == (0, 1)
    reader.close()


def test_ranks_that_see_parts_of_the_tokens_add_up(tmp_path) -> None:
    with Worker(tmp_path / "run", "t0") as first, Worker(tmp_path / "run", "t1") as second:
        parts = [tally("a", tokens=8), tally("a", tokens=5, seed=1)]
        parts[1].stats[:, 3] = FIXED_POINT // 8
        first.writer.write(parts[:1])
        second.writer.write(parts[1:])
        reader = RecordReader(tmp_path / "run")
        (record,) = reader.poll()
        assert np.array_equal(record.counts, parts[0].counts + parts[1].counts)
        assert set(record.column("prefill")) == {13}
        assert set(record.column("entropy_min")) == {FIXED_POINT // 8}
        reader.close()


def test_long_ids_are_cut_and_stay_apart() -> None:
    a, b = short_id("x" * 5000 + "a"), short_id("x" * 5000 + "b")
    assert a != b
    assert len(a) == 200
    worst = Meta("\U0001f600" * 200, 10**9, 10**9, 10**9, time.time(), time.time())
    assert Meta.from_array(worst.to_array(10**12)).id == worst.id
    control = Meta(short_id("\x01" * 300), 1, 1, 1, 0.0, 0.0)
    assert Meta.from_array(control.to_array(1)) == Meta(control.id, 1, 1, 1, 0.0, 0.0, 1)


@pytest.mark.parametrize(("layers", "experts"), [(1, 8), (16, 64), (58, 256), (94, 512)])
def test_records_stay_within_their_share_of_the_board(layers, experts) -> None:
    n = record_segments(layers, experts)["request"].copies
    assert 16 <= n <= 256
    assert n * (slot_bytes(layers, experts) + 2048) <= max(8 << 20, 16 * (slot_bytes(layers, experts) + 2048))


# the front end


def front_end(directory) -> FrontEnd:
    collector = MoeCollector(directory, server="server-1")
    return FrontEnd(directory, "server-1", FleetLoad(collector), logging.getLogger(__name__))


def finish(front: FrontEnd, name: str, at: float = 0.0, **more) -> None:
    front._thread = front._thread or object()  # matched by hand here
    front.finish(name, Finished(at, e2e=1.0, ttft=0.2, tpot=0.01, **more))


class Parent:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_either_half_may_come_first(tmp_path) -> None:
    front, spans = front_end(tmp_path / "run"), []
    front.emit = lambda parent, summary: spans.append((parent, summary.record.meta.id))
    with Worker(tmp_path / "run") as worker:
        finish(front, "a", complete=False)
        front.notice("a", Parent)
        worker.writer.write([tally("a"), tally("b")])
        front.match(1.0)
        assert spans == []  # its span might still have come
        front.complete("a")
        front.match(1.2)
        finish(front, "b")  # without tracing
        front.match(1.4)
        front.match(1.6)
        assert spans == [(Parent, "a")]
        text = MoeCollector(tmp_path / "run", server="server-1").render(openmetrics=True).decode()
        families = {f.name: f for f in parse_openmetrics(text)}
        samples = families["moe_request_concentration_ratio"].samples
        assert [s.value for s in samples if s.name.endswith("_count")] == [2]
        (seen,) = [s.exemplar for s in samples if s.exemplar]
        assert seen.labels == {"trace_id": Parent.trace_id}
        counts = [s for s in families["moe_request_e2e_seconds"].samples if s.name.endswith("_count")]
        assert {s.labels["quartile"] for s in counts} == {"1", "2", "3", "4"}
        assert sum(s.value for s in counts) == 2
        front._board.close()


def test_halves_without_the_other_are_forgotten(tmp_path) -> None:
    front = front_end(tmp_path / "run")
    with Worker(tmp_path / "run") as worker:
        worker.writer.write([tally("aborted")])
        finish(front, "untraced", at=0.0)
        front.match(1.0)
        assert (len(front._records), len(front._finished)) == (1, 1)
        front.match(40.0)
        assert (len(front._records), len(front._finished)) == (0, 0)
        for i in range(MOST_FINISHED + 10):
            finish(front, f"r{i}", at=50.0)
        assert len(front._finished) == MOST_FINISHED
        for _ in range(4):
            worker.writer.write(tally(f"x{i}") for i in range(100))
            front.match(50.0)
        assert len(front._records) <= MOST_RECORDS


def test_records_are_gathered_while_requests_are_answered_and_not_else(tmp_path, monkeypatch) -> None:
    front, matched = front_end(tmp_path / "run"), []
    monkeypatch.setattr(front, "match", lambda now: (matched.append(now), FrontEnd.match(front, now)))
    with Worker(tmp_path / "run") as worker:
        finish(front, "a")
        assert front.look(1.0) == POLL and matched == [1.0]
        for i in range(1, 5):
            finish(front, f"b{i}")
            worker.writer.write([tally(f"b{i}")])
            assert front.look(1.0 + POLL * i) == POLL_SOON
        assert len(matched) == 1, "not until there is enough, or it is time"
        finish(front, "c")
        front.look(1.0 + GATHER)
        assert matched == [1.0, 1.0 + GATHER] and list(front._finished) == ["a", "c"]
        front.look(3.1)
        assert matched[-1] == 3.1, "nobody is in the way"
        finish(front, "d")
        worker.writer.write(tally(f"e{i}") for i in range(64))
        assert front.look(3.2) == POLL_SOON and matched[-1] == 3.2, "a quarter of the ring"
        finish(front, "f")
        assert front.look(3.3) == POLL, "nothing waits"
        assert matched[-1] == 3.2
        front._board.close()


def test_a_failure_ends_tracing_and_nothing_else(tmp_path, caplog) -> None:
    front = front_end(tmp_path / "run")
    front.match = lambda now: 1 / 0
    front.finish("a", Finished(0.0))
    front._thread.join(5)
    assert front.failed
    assert caplog.text.count("traces no requests any more") == 1 and "ZeroDivisionError" in caplog.text


def test_api_servers_add_up(tmp_path) -> None:
    """Each writes a board of its own; readers of engines do not see those."""
    with FakeWorker(tmp_path / "run"):
        first, second = FrontBoard(tmp_path / "run", "server-1"), FrontBoard(tmp_path / "run", "server-1")
        second._directory = tmp_path / "run"
        values = {"entropy": 0.5, "concentration": 1.2, "drift": math.nan, "e2e": 0.3, "ttft": 0.1, "tpot": 0.01}
        first.add(("tiny-olmoe", "0"), values)
        first.publish()
        first._board.path.rename(first._board.path.with_name("other.board"))  # one process plays two
        second.add(("tiny-olmoe", "0"), values)
        second.add(("tiny-olmoe", "1"), values)
        second.dropped["spans"] = 3
        second.publish()
        assert [e.engine for e in read_engines(tmp_path / "run")] == ["0"]
        text = MoeCollector(tmp_path / "run", server="server-1").render().decode()
        assert 'moe_request_entropy_ratio_count{model_name="tiny-olmoe",engine="0"} 2' in text
        assert 'moe_request_entropy_ratio_count{model_name="tiny-olmoe",engine="1"} 1' in text
        assert 'moe_request_drift_bits_count{model_name="tiny-olmoe",engine="0"} 0' in text
        assert 'moe_monitor_dropped_total{model_name="tiny-olmoe",engine="0",what="spans"} 3' in text
        first.close()
        second.close()
        assert "moe_request" not in MoeCollector(tmp_path / "run", server="server-1").render().decode()


def test_a_front_board_grows_with_its_engines(tmp_path) -> None:
    board = FrontBoard(tmp_path / "run", "s")
    values = {"entropy": 0.5, "concentration": 1.2, "drift": 0.1, "e2e": 0.3, "ttft": 0.1, "tpot": math.nan}
    board.add(("m", "0"), values)
    board.publish()
    board.add(("m", "1"), values)
    board.publish()
    (path,) = (tmp_path / "run").glob("*.board")
    with BoardReader(path) as reader:
        assert reader.alive
        assert reader.identity["engines"] == [["m", "0"], ["m", "1"]]
    path.unlink()  # by a clean-up of temporary folders
    board.add(("m", "0"), values)
    board.publish()
    with BoardReader(path) as reader:
        assert reader.read("engine/0").arrays["entropy"].sum() == 2, "what was counted before is still there"
    board.close()
    assert not path.exists()


def test_quartiles_part_recent_requests_evenly() -> None:
    rng, quartiles = np.random.default_rng(0), Quartiles()
    places = [quartiles.place(v) for v in rng.gamma(2.0, size=2000)]
    assert np.bincount(places[400:], minlength=4).min() > 330
    assert quartiles.place(100.0) == 3
    assert quartiles.place(-1.0) == 0


# what a request tells


def test_a_summary_by_hand(tmp_path) -> None:
    with Worker(tmp_path / "run", layers=(3,), experts=4, top_k=2) as worker:
        counts = np.zeros((1, 2, 4), dtype=np.int32)
        counts[0, 0] = [4, 0, 3, 1]
        counts[0, 1] = [1, 1, 0, 0]
        stats = np.zeros((1, 8), dtype=np.int64)
        stats[0, :2] = 4, 1
        stats[0, 2:7] = 2 * FIXED_POINT, FIXED_POINT // 4, FIXED_POINT, 3 * FIXED_POINT, 1
        worker.writer.write([Tally(Meta("a", 6, 2, 1, 1.0, 2.0), counts, stats)])
        reader = RecordReader(tmp_path / "run")
        (record,) = reader.poll()
        reader.close()
    summary = summarise(record, np.array([[5, 1, 3, 1]]))
    assert (summary.prefill, summary.decode) == (4, 1)
    assert summary.entropy.tolist() == [0.5]  # of 5 tokens one was not finite
    assert summary.entropy_min.tolist() == [0.25]
    assert summary.imbalance.tolist() == [2.0]
    assert summary.concentration == pytest.approx(2.0 / summary.chance[0])
    assert summary.drift.tolist() == [0.0]
    assert summary.top_experts(0) == [(0, 0.5), (2, 0.3), (1, 0.1), (3, 0.1)]
    told = as_json(summary)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert told["layers"][0]["layer"] == 3


def test_requests_that_are_looked_at_together_are_told_as_each_alone(tmp_path, monkeypatch) -> None:
    """Of two engines, of which one's load is not known, one request without a token, and more than fit at a time."""
    directory = tmp_path / "run"
    with Worker(directory) as worker, Worker(directory, name="rank-1", layers=(2, 5), experts=8, engine="1") as other:
        worker.writer.write([tally(f"a{i}", tokens=i, seed=i) for i in range(80)])
        other.writer.write([tally(f"b{i}", tokens=5 + i, layers=2, experts=8, seed=i, top_k=2) for i in range(3)])
        with contextlib.closing(RecordReader(directory)) as reader:
            records = reader.poll()
    random.Random(0).shuffle(records)
    load = np.random.default_rng(0).integers(1, 100, (4, 64))
    fleet = lambda record: load if record.engine == "0" else None  # noqa: E731
    pauses = []
    monkeypatch.setattr("moe_monitor.export.requests._AT_ONCE", 1 << 14)
    told = overviews(records, fleet, lambda: pauses.append(True))
    assert len(told) == 83 and len(pauses) > 2
    for record, overview in zip(records, told, strict=True):
        summary = summarise(record, fleet(record))
        alone = mean(summary.entropy), summary.concentration, mean(summary.drift)
        assert overview == pytest.approx(alone, rel=1e-12, nan_ok=True)
    unknown = {record.meta.id: np.isnan(overview).tolist() for record, overview in zip(records, told, strict=True)}
    assert unknown["a0"] == [True, True, True]
    assert unknown["b0"] == [False, False, True] and unknown["a7"] == [False, False, False]


def test_the_fleets_load_is_read_again_sooner_while_there_is_little_of_it(tmp_path, monkeypatch) -> None:
    collector, now, reads = MoeCollector(tmp_path / "run", server="server-1"), [0.0], []
    monkeypatch.setattr("moe_monitor.export.requests.time.monotonic", lambda: now[0])
    read = collector.read
    collector.read = lambda: (reads.append(now[0]), read())[1]
    fleet = FleetLoad(collector)
    with Worker(tmp_path / "run") as worker:
        worker.writer.write([tally("a")])
        with contextlib.closing(RecordReader(tmp_path / "run")) as reader:
            (record,) = reader.poll()

        def read_at(*times):
            reads.clear()
            for now[0] in times:
                assert fleet.of(record) is not None
            return reads

        assert read_at(0.0, 0.5, 1.0, 1.5, 2.0) == [0.0, 1.0, 2.0]
        assert 4 * 8 * 1000 < FleetLoad.FEW < 4 * 8 * 50_000  # choices of so many tokens
        worker.board.write("routing", {"rows": routed_rows(4, 64, 8, 50_000), "passes": np.array([2])})
        assert read_at(3.0, 4.0, 12.9, 13.0) == [3.0, 13.0]


def test_boards_are_looked_for_when_the_directory_has_changed(tmp_path, monkeypatch) -> None:
    directory, looked = tmp_path / "run", []
    monkeypatch.setattr("moe_monitor.records.board_paths", lambda path: looked.append(path) or board_paths(path))
    reader = RecordReader(directory)
    with Worker(directory) as worker:
        os.utime(directory, (time.time() - 10,) * 2)
        worker.writer.write([tally("a")])
        assert len(reader.poll()) == 1 and len(looked) == 1
        worker.writer.write([tally("b")])
        assert len(reader.poll()) == 1 and len(looked) == 1
        with Worker(directory, name="rank-1", engine="1") as other:
            other.writer.write([tally("c")])
            assert [r.meta.id for r in reader.poll()] == ["c"] and len(looked) == 2
            changed = os.stat(directory)
            with Worker(directory, name="rank-2", engine="2") as third:  # in the same tick of the directory's clock
                os.utime(directory, ns=(changed.st_mtime_ns,) * 2)
                third.writer.write([tally("d")])
                now = time.time()
                monkeypatch.setattr("moe_monitor.records.time.time", lambda: now + 3.0)
                assert [r.meta.id for r in reader.poll()] == ["d"] and len(looked) == 3
                assert reader.poll() == [] and len(looked) == 3
        assert reader.poll() == [] and len(reader._boards) == 1
    reader.close()


def test_a_request_that_a_rank_has_yet_to_hand_over_is_not_shown_by_half(tmp_path) -> None:
    directory = tmp_path / "run"
    fleet = FleetLoad(MoeCollector(directory, server="server-1"))
    old = tally("old", layers=2)
    old = replace(old, meta=replace(old.meta, finished=time.time() - PATIENCE - 1))
    with Worker(directory, "s0", layers=(0, 1)) as first, Worker(directory, "s1", layers=(2, 3)) as second:
        first.writer.write([old, tally("a", layers=2)])
        assert [(s.record.meta.id, s.record.layers) for s in recent(directory, fleet)] == [("old", (0, 1))]
        second.writer.write([tally("a", layers=2)])
        assert [s.record.layers for s in recent(directory, fleet)] == [(0, 1, 2, 3), (0, 1)]


def test_a_request_without_tokens_knows_nothing(tmp_path) -> None:
    with Worker(tmp_path / "run") as worker:
        nothing = tally("a", tokens=0)
        nothing.stats[:, 3] = 1 << 40
        worker.writer.write([nothing])
        reader = RecordReader(tmp_path / "run")
        told = as_json(summarise(reader.poll()[0], np.ones((4, 64), dtype=np.int64)))
        reader.close()
    assert told["entropy"] is told["entropy_min"] is told["concentration"] is told["drift_bits"] is None
    json.dumps(told, allow_nan=False)


def test_the_terminal_shows_one_request_or_all(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MOE_MONITOR_DIR", str(tmp_path / "run"))
    assert main(["request"]) == 0
    assert "No traced requests." in capsys.readouterr().out
    with Worker(tmp_path / "run") as worker:
        worker.writer.write([tally("cmpl-one-0-aaaa"), tally("cmpl-two-0-bbbb", tokens=30)])
        assert main(["request"]) == 0
        shown = capsys.readouterr().out
        assert shown.index("cmpl-two") < shown.index("cmpl-one"), "newest first"
        assert main(["request", "two"]) == 0
        shown = capsys.readouterr().out
        assert "30 prompt tokens computed" in shown
        assert main(["request", "--json", "cmpl-one-0-aaaa"]) == 0
        (told,) = json.loads(capsys.readouterr().out)
        assert (told["id"], len(told["layers"])) == ("cmpl-one-0-aaaa", 4)
        assert told["drift_bits"] is not None
        assert main(["request", "three"]) == 1
        assert "no traced request has 'three' in its id" in capsys.readouterr().err
