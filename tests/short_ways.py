"""Stand-ins for what the short ways of the hooks work with."""

from __future__ import annotations

from types import SimpleNamespace


class Box:
    """A mailbox with a device that keeps up."""

    def __init__(self) -> None:
        self.words, self.begun, self.posted = [0] * 64, [1], 1
        self.unsent, self.spans, self.told = False, None, 0


def meter(**of):
    fresh = {"clean": True, "valid": 0, "counted": None, "passes": 0, "tallies": None, "turn": -1, "pending": {}}
    return SimpleNamespace(**{**fresh, **of})


def output(*new, **tokens):
    """The scheduler's."""
    total = sum(tokens.values())
    return SimpleNamespace(total_num_scheduled_tokens=total, num_scheduled_tokens=tokens, scheduled_new_reqs=list(new))


class Capture:
    """Notes which general hooks are called."""

    def __init__(self, fuse, meter, timing) -> None:
        self.fuse, self.meter, self.timing, self.live = fuse, meter, timing, {}
        self.warming_up, self.tracer, self.said = False, object(), []

    def short(self):
        return self.live, self.meter, self.timing

    def begin_step(self, scheduled) -> None:
        self.said.append("step")

    def begin_pass(self, tokens, scheduled) -> None:
        self.said.append(("pass", tokens, scheduled))

    def trace_rows(self, *args) -> None:
        self.said.append("rows")

    def batch_is(self, batch) -> None:
        self.said.append(("batch", batch.num_tokens))

    def end_pass(self, tokens) -> None:
        self.said.append(("end", tokens))

    def begin_dummy(self) -> None:
        self.said.append("dummy")


class RunnerV1:
    def __init__(self, replays) -> None:
        self._replays = replays

    def execute_model(self, scheduler_output) -> None:
        self._model_forward()

    def _model_forward(self) -> None:
        self._replays()


class RunnerV2:
    """``prepared``: tokens of the batch; None: as many as were scheduled."""

    prepared: int | None = None

    def __init__(self, replays) -> None:
        self._replays = replays

    def execute_model(self, scheduler_output) -> None:
        self.execute_model_state = SimpleNamespace(input_batch=self.prepare_inputs(scheduler_output))
        self._replays()

    def prepare_inputs(self, scheduler_output):
        tokens = scheduler_output.total_num_scheduled_tokens if self.prepared is None else self.prepared
        return SimpleNamespace(num_tokens=tokens)
