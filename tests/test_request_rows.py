"""Whose rows are whose through the seams of both model runners, with a runner that acts like vLLM's.

The runner here decides on the order of the rows, as vLLM's do (V2 puts decodes first, whatever order the scheduler
names them in), routes at random, and keeps its own account of what each request routed. Tracer, meter and seams are
the real ones. The real V2 runner needs a GPU: benchmarks/gpu/requests_exact.py.
"""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_monitor import settings

torch = pytest.importorskip("torch")

from moe_monitor.capture.meter import Meter  # noqa: E402
from moe_monitor.capture.requests import LOST_AFTER, Tracer  # noqa: E402
from moe_monitor.capture.tallies import HostTallies  # noqa: E402
from moe_monitor.capture.vllm import runner_v1, runner_v2  # noqa: E402
from moe_monitor.capture.vllm.attach import Capture  # noqa: E402

LAYERS, EXPERTS, TOP_K, SLOTS = 3, 16, 2, 8


def request(name: str, prompt: int, computed: int = 0) -> SimpleNamespace:
    params = SimpleNamespace(extra_args={"moe_trace": 0} if name.startswith("untraced") else None)
    return SimpleNamespace(
        req_id=name, sampling_params=params, prompt_token_ids=[1] * prompt, num_computed_tokens=computed
    )


def scheduled(n: dict[str, int], new=(), preempted=(), finished=()) -> SimpleNamespace:
    return SimpleNamespace(
        num_scheduled_tokens=n,
        total_num_scheduled_tokens=sum(n.values()),
        scheduled_new_reqs=list(new),
        preempted_req_ids=set(preempted) or None,
        finished_req_ids=set(finished),
    )


class Attached(Capture):
    """A capture that traces every request of a made-up model, without a board."""

    meter: Meter

    def _attach(self, model_runner: Any) -> dict[str, Any]:
        self.meter = Meter(range(LAYERS), EXPERTS, "softmax")
        self.meter.tallies = HostTallies(SLOTS, LAYERS, EXPERTS)
        self.tracer = Tracer(self.meter.tallies, 1.0, self.fuse.status)
        self.fuse.status.active = True
        return {}

    def _publish(self, *_: Any) -> None:
        pass


class Runner:
    """The parts of a model runner that the seams touch. ``account``: [layers, phases, experts] by request."""

    vllm_config = None

    def __init__(self, *, tells_first_rows: bool = True) -> None:
        self.capture = Attached(self, settings.load({}))
        self.tells_first_rows = tells_first_rows
        self.account: dict[str, np.ndarray] = {}
        self.computed: dict[str, int] = {}
        self.prompts: dict[str, int] = {}
        self._generator = torch.Generator().manual_seed(3)

    def _order(self, n: dict[str, int]) -> list[str]:
        return sorted(n, key=lambda name: n[name])  # decodes first, else as the scheduler has them

    def first_rows(self, names: list[str], n: dict[str, int]) -> np.ndarray:
        return np.cumsum([0, *(n[name] for name in names)], dtype=np.int32)

    def _begin(self, step: Any) -> list[str]:
        for new in step.scheduled_new_reqs:
            self.computed[new.req_id] = new.num_computed_tokens
            self.prompts[new.req_id] = len(new.prompt_token_ids)
        return self._order(step.num_scheduled_tokens)

    def _route(self, names: list[str], n: dict[str, int], padding: int = 3) -> None:
        """All layers route the rows of the batch and some padding; the account is kept by position."""
        rows = sum(n.values())
        for layer in range(LAYERS):
            logits = torch.randn(rows + padding, EXPERTS, generator=self._generator)
            ids = logits.topk(TOP_K).indices
            self.capture.observe(layer, logits, ids)
            at = 0
            for name in names:
                account = self.account.setdefault(name, np.zeros((LAYERS, 2, EXPERTS), dtype=np.int64))
                for i in range(n[name]):
                    decode = self.computed[name] + i >= self.prompts[name]
                    np.add.at(account[layer, int(decode)], ids[at].numpy(), 1)
                    at += 1

    def advance(self, accepted: dict[str, int]) -> None:
        for name, tokens in accepted.items():
            self.computed[name] += tokens


class V1(Runner):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.input_batch = SimpleNamespace()
        self._places: list[str] = []
        if self.tells_first_rows:
            self.query_start_loc = SimpleNamespace(np=np.zeros(65, dtype=np.int32))
        runner_v1._patch_steps(self, self.capture)

    def _order(self, n: dict[str, int]) -> list[str]:
        """Who comes takes the place of one who has left, and so do the last, where nobody comes."""
        coming = [name for name in n if name not in self._places]
        for at, name in enumerate(self._places):
            if name not in n and coming:
                self._places[at] = coming.pop(0)
        self._places += coming
        for at in range(len(self._places)):
            while at < len(self._places) and self._places[at] not in n:
                last = self._places.pop()
                if at < len(self._places):
                    self._places[at] = last
        return list(self._places)

    def step(self, output: Any) -> None:
        self.execute_model(output)

    def dummy(self) -> None:
        self.capture.begin_dummy()
        self._route([], {}, padding=4)

    def execute_model(self, output: Any) -> None:
        names = self._begin(output)
        if names:
            self.input_batch.req_ids = names
            self.input_batch.req_id_to_index = {name: i for i, name in enumerate(names)}
            self.input_batch.num_computed_tokens_cpu = np.array([self.computed[i] for i in names])
            if self.tells_first_rows:  # the same array for all passes
                self.query_start_loc.np[: len(names) + 1] = self.first_rows(names, output.num_scheduled_tokens)
            self._model_forward(names, output.num_scheduled_tokens)

    def _model_forward(self, names: list[str], n: dict[str, int]) -> None:
        self._route(names, n)


class V2(Runner):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.execute_model_state = None
        runner_v2._patch_steps(self, self.capture)

    def step(self, output: Any) -> None:
        self.execute_model(output)

    def dummy(self) -> None:
        self.execute_model(scheduled({"dummy": 4}), None, True)

    def execute_model(self, output: Any, intermediate: Any = None, dummy_run: bool = False) -> None:
        self.execute_model_state = None
        if dummy_run:
            self._route([], {}, padding=4)
            return
        names = self._begin(output)
        if not names:
            return
        batch = self.prepare_inputs(output, SimpleNamespace())
        self._route(batch.req_ids, output.num_scheduled_tokens)
        self.execute_model_state = SimpleNamespace(input_batch=batch)

    def prepare_inputs(self, output: Any, batch_desc: Any) -> SimpleNamespace:
        names = self._order(output.num_scheduled_tokens)
        batch = SimpleNamespace(
            req_ids=names,
            num_tokens=output.total_num_scheduled_tokens,
            num_computed_tokens_np=np.array([self.computed[i] for i in names]),
        )
        if self.tells_first_rows:
            batch.query_start_loc_np = self.first_rows(names, output.num_scheduled_tokens)
        return batch


@pytest.mark.parametrize("kind", [V1, V2])
def test_rows_follow_the_runners_own_batch(kind: type[Runner]) -> None:
    """Chunked prefill, a prefix hit, speculative tokens that are partly rejected, preemption and resumption, an abort,
    dummy passes in between; untraced requests beside them.
    """
    runner = kind()
    step = lambda n, accepted=None, **more: (  # noqa: E731
        runner.step(scheduled(n, **more)),
        runner.advance(n if accepted is None else accepted),
    )
    runner.dummy()
    step({"long": 7, "untraced": 2, "hit": 1}, new=[request("long", 12), request("untraced", 2), request("hit", 6, 5)])
    step({"hit": 4, "long": 5, "untraced": 1}, {"hit": 2, "long": 5, "untraced": 1})  # hit: 3 drafts, 1 accepted
    runner.dummy()
    step({"untraced": 1, "long": 4, "hit": 4}, {"untraced": 1, "long": 4, "hit": 1})
    step({"hit": 1, "late": 3}, new=[request("late", 9)], preempted=["long"])
    runner.computed["long"] = 0  # V2 gets a resumed request as a new one, V1 knows it
    resumed = [request("long", 12)] if kind is V2 else []
    step({"long": 17, "hit": 1}, new=resumed, finished=["late"])  # late: aborted within its prompt
    step({"long": 1}, finished=["hit"])
    step({}, {}, finished=["long", "untraced"])

    capture = runner.capture
    assert capture.fuse.status.errors == {}
    assert capture.fuse.status.dropped == {}
    told = {tally.meta.id: tally for tally in capture.tracer.drain(SLOTS)}
    assert set(told) == {"long", "hit", "late"}
    for name, tally in told.items():
        assert np.array_equal(tally.counts, runner.account[name]), name
    assert told["long"].meta.preemptions == 1
    assert told["hit"].meta.cached_tokens == 5
    total = sum(account.sum(axis=1) for account in runner.account.values())
    assert np.array_equal(capture.meter.layout.column(capture.meter.read_rows(), "experts"), total)


@pytest.mark.parametrize("tells_first_rows", [True, False])
@pytest.mark.parametrize("kind", [V1, V2])
def test_rows_are_right_while_requests_come_and_go(kind: type[Runner], tells_first_rows: bool) -> None:
    """Hundreds of short requests, few of them traced, with chunked prompts, drafts, preemptions and waiting turns."""
    runner, draw = kind(tells_first_rows=tells_first_rows), random.Random(5)
    tracer = runner.capture.tracer
    left, running, finished, told, stays = {}, [], set(), [], []
    stay, moved = tracer._stay, []

    def watched(ids: list[str]) -> bool:
        were = tracer._at
        stays.append(stay(ids))
        moved.append(tracer._at is not were)
        return stays[-1]

    tracer._stay = watched
    for step in range(400):
        new, preempted = [], set()
        while len(running) < 12 and (draw.random() < 0.5 or not running):
            name = f"{'' if draw.random() < 0.3 else 'untraced-'}{len(left)}"
            left[name] = draw.randint(1, 12)
            new.append(request(name, draw.randint(1, 9)))
            running.append(name)
        if step > 200 and draw.random() < 0.3 and len(running) > 1:
            name = running.pop(draw.randrange(len(running)))
            if name in runner.computed:  # begins again at once, at the end, as one more prompt of its own length
                preempted.add(name)
                runner.computed[name] = 0
                new += [request(name, runner.prompts[name])] if kind is V2 else []
            running.append(name)
        prompts = runner.prompts | {r.req_id: len(r.prompt_token_ids) for r in new}
        n = {}
        for name in running:
            rest = prompts[name] - runner.computed.get(name, 0)
            waits = draw.random() < 0.02 and name in runner.computed and name not in preempted
            if not waits:
                n[name] = min(rest, 5) if rest > 0 else draw.choice([1, 1, 1, 1, 1, 1, 1, 1, 3 if step > 300 else 1])
        runner.step(scheduled(n, new=new, preempted=preempted, finished=finished))
        runner.advance(n)
        for name in n:
            left[name] -= runner.computed[name] >= runner.prompts[name]
        finished = {name for name in running if left[name] <= 0}
        running = [name for name in running if name not in finished]
        told += tracer.drain(SLOTS)
    runner.step(scheduled({}, finished={*finished, *running}))
    told += tracer.drain(SLOTS)

    assert runner.capture.fuse.status.errors == {} and runner.capture.fuse.status.dropped == {}
    assert {tally.meta.id for tally in told} == {name for name in left if not name.startswith("untraced")}
    assert len(told) > 100 and 20 < sum(stays) < len(stays)
    assert sum(moved) > (0 if kind is V1 else 20), "those that move up a little are found"
    for tally in told:
        assert np.array_equal(tally.counts, runner.account[tally.meta.id]), tally.meta.id


def test_a_lost_request_is_noticed_when_others_come() -> None:
    runner = V1()
    runner.step(scheduled({"lost": 1}, new=[request("lost", 1)]))
    runner.advance({"lost": 1})
    tracer, hour = runner.capture.tracer, LOST_AFTER + 1
    tracer._clock = lambda: time.monotonic() + hour
    runner.step(scheduled({"untraced-1": 1}, new=[request("untraced-1", 1)]))
    assert not tracer.live and runner.capture.fuse.status.dropped == {"lost_requests": 1}


def test_rows_that_the_runner_dropped_are_nobodys() -> None:
    """Adaptive verification runs fewer draft tokens than were scheduled, and does not say whose."""
    runner = V2()
    prepare = runner.prepare_inputs
    runner.step(scheduled({"a": 3}, new=[request("a", 3)]))
    runner.advance({"a": 3})

    def fewer(n: dict[str, int], starts: Any) -> None:
        batch = prepare(scheduled({"a": 2}), None)
        runner.capture.trace_rows(batch, None, n, sum(n.values()), "num_computed_tokens_np", starts)

    fewer({"a": 4}, None)
    assert runner.capture.fuse.status.dropped == {"unattributed_passes": 1}
    fewer({"a": 4}, np.array([0, 4], np.int32))
    assert runner.capture.fuse.status.dropped == {"unattributed_passes": 2}


def test_a_batch_that_contradicts_itself_switches_the_monitor_off() -> None:
    """Better no attribution than a wrong one."""
    runner = V1()
    runner.step(scheduled({"a": 3, "b": 3}, new=[request("a", 3), request("b", 3)]))
    runner.input_batch.req_id_to_index = {"a": 1, "b": 0}
    starts = np.array([0, 2, 3], np.int32)
    runner.capture.trace_rows(runner.input_batch, 3, {"a": 2, "b": 1}, 3, "num_computed_tokens_cpu", starts)
    assert runner.capture.fuse.blown
    assert "the batch says that 'a' is at 1, where 'b' is" in runner.capture.fuse.status.reason


def test_the_seams_row_names_are_the_runners() -> None:
    """A tracer that the V2 seam cannot feed is switched off rather than wrong."""
    runner = V2()
    bare = SimpleNamespace(execute_model=lambda *_: None)
    runner_v2._patch_steps(bare, runner.capture)
    assert runner.capture.tracer is None
