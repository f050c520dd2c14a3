"""Stand-ins for what the short ways of the hooks work with."""

from __future__ import annotations

from types import SimpleNamespace

from moe_monitor.capture import quick
from moe_monitor.capture.vllm.hooks import Short


class Box:
    """A mailbox with a device that keeps up."""

    def __init__(self) -> None:
        self.words, self.begun, self.posted = [0] * 64, [1], 1
        self.unsent, self.spans, self.told = False, None, 0


def meter(**of):
    fresh = {"clean": True, "valid": 0, "counted": None, "passes": 0, "tallies": None, "turn": -1, "pending": {}}
    fresh |= {"addresses": [0] * 6, "few": 0}
    return SimpleNamespace(**{**fresh, **of})


def output(*new, **tokens):
    """The scheduler's."""
    total = sum(tokens.values())
    return SimpleNamespace(total_num_scheduled_tokens=total, num_scheduled_tokens=tokens, scheduled_new_reqs=list(new))


class Capture:
    """Notes which general hooks the seam of a model runner calls. No pass is short unless there is a ``meter``."""

    def __init__(self, fuse, meter=None, timing=None) -> None:
        self.fuse, self.live = fuse, {}
        self.meter, self.timing = meter or quick.Unmetered(), timing or quick.Untimed()
        self.warming_up, self.tracer, self.said = False, object(), []

    def short(self):
        return Short(self.live, self.meter, self.timing)

    def begin_step(self, scheduled) -> None:
        self.said.append("step")

    def begin_pass(self, tokens, scheduled) -> None:
        assert sum(scheduled.values()) == tokens
        self.said.append(("pass", tokens))

    def trace_rows(self, batch, *_) -> None:
        self.said.append(("rows", batch))

    def batch_is(self, batch) -> None:
        self.said.append(("batch", batch))

    def end_pass(self, tokens) -> None:
        self.said.append(("end", tokens))

    def begin_dummy(self) -> None:
        self.said.append("dummy")


class RunnerV1:
    """Its passes do no more than to replay a graph."""

    def __init__(self, replays) -> None:
        self._replays = replays

    def execute_model(self, scheduler_output) -> None:
        self._model_forward()

    def _model_forward(self) -> None:
        self._replays()


class RunnerV2:
    """As vLLM's: inputs are prepared for all passes but dummies; a pass leaves its batch behind, or ``state``.
    ``prepared``: its batch; None: one of as many tokens as were scheduled.
    """

    execute_model_state = state = prepared = None

    def __init__(self, replays=lambda: None) -> None:
        self._replays = replays

    def execute_model(self, scheduler_output, intermediate_tensors=None, dummy_run=False) -> None:
        self.execute_model_state = None
        if scheduler_output.total_num_scheduled_tokens and not dummy_run:
            batch = self.prepare_inputs(scheduler_output)
            self._replays()
            self.execute_model_state = self.state or SimpleNamespace(input_batch=batch)

    def prepare_inputs(self, scheduler_output):
        return self.prepared or SimpleNamespace(num_tokens=scheduler_output.total_num_scheduled_tokens)
