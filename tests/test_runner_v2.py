"""The seam of model runner V2, on a runner of its shape: which passes are a server's work.

vLLM's own V2 runner needs Triton and a GPU; ``benchmarks/gpu/requests_exact.py`` runs it.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from short_ways import Capture, RunnerV2, output

from moe_monitor.capture.fuse import Fuse
from moe_monitor.capture.vllm import runner_v2
from moe_monitor.capture.vllm.plugin import SENTINEL


@pytest.fixture
def runner() -> Any:
    made: Any = RunnerV2()
    capture = Capture(Fuse(logging.getLogger("test")))
    capture.live["a"] = "a traced request"
    setattr(made, SENTINEL, capture)
    runner_v2._patch_steps(made, capture)
    yield made
    runner_v2._active = None


def said(runner: Any) -> list[Any]:
    capture = getattr(runner, SENTINEL)
    result, capture.said = capture.said, []
    return result


def test_a_real_pass(runner: Any) -> None:
    batch = runner.prepared = SimpleNamespace(num_tokens=3)  # fewer than were scheduled
    runner.execute_model(output(a=3, b=1))
    assert said(runner) == ["step", ("pass", 4), ("batch", batch), ("rows", batch), ("end", 3)]


def test_a_pass_as_it_was_scheduled_of_requests_that_nobody_traces(runner: Any) -> None:
    getattr(runner, SENTINEL).live.clear()
    runner.execute_model(output(a=3, b=1))
    assert said(runner) == [("pass", 4), ("end", 4)]
    runner.execute_model(output("a new one", a=3, b=1))
    assert said(runner) == ["step", ("pass", 4), ("end", 4)]


def test_a_model_runner_that_keeps_its_batch_elsewhere_switches_the_monitor_off(runner: Any) -> None:
    runner.state = SimpleNamespace(input_batch=None)
    runner.execute_model(output(a=3))
    fuse = getattr(runner, SENTINEL).fuse
    assert fuse.blown and "num_tokens" in fuse.status.reason
    runner.execute_model(output(a=3))
    assert fuse.status.errors == {"record": 1} and ("end", 3) not in said(runner)


def test_a_batch_that_does_not_tell_its_tokens_switches_the_monitor_off(runner: Any) -> None:
    runner.prepared = "batch"
    runner.execute_model(output(a=3))
    runner.execute_model(output(a=3))
    assert getattr(runner, SENTINEL).fuse.status.errors == {"record": 1}
    fuse = getattr(runner, SENTINEL).fuse
    assert fuse.blown and "num_tokens" in fuse.status.reason


def test_graphs_are_named_by_the_managers_of_the_target_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    class Base:
        def capture(self, create_forward_fn: Any) -> Any:
            return create_forward_fn("8 tokens")

        def run_pw_graph(self, *args: Any) -> None:
            ran.append("pieces")

    class Target(Base):
        def run_fullgraph(self, desc: Any) -> None:
            ran.append(desc)

    monkeypatch.setattr(runner_v2, "_streams", 1)
    module: Any = SimpleNamespace(CudaGraphManager=Base, ModelCudaGraphManager=Target)
    runner_v2.patch_graphs(module)
    worker: Any = Capture(Fuse(logging.getLogger("test")))
    runner_v2._patch_steps(RunnerV2(), worker)
    assert worker.capture_streams == 2, "as in vLLM 0.28"
    module.current_stream = None
    runner_v2.patch_graphs(module)
    runner_v2._patch_steps(RunnerV2(), worker)
    assert worker.capture_streams == 1, "as in vLLM 0.29"
    noted: list[Any] = []
    capture = SimpleNamespace(note_graph=lambda key=None: noted.append(key), begin_dummy=lambda: noted.append("dummy"))
    capture.names_graphs = True
    monkeypatch.setattr(runner_v2, "_active", capture)
    Target().run_fullgraph("8 tokens")
    Target().run_pw_graph()
    Base().run_pw_graph()  # a draft model's
    assert (noted, ran) == ([("FULL", "8 tokens"), None], ["8 tokens", "pieces", "pieces"])
    noted.clear()
    capture.names_graphs = False
    Target().run_fullgraph("8 tokens")
    Target().run_pw_graph()
    assert noted == []
    assert Target().capture(lambda desc: capture.capturing) == ("FULL", "8 tokens")
    assert noted == ["dummy"] and capture.capturing is None


def test_a_dummy_pass_is_not_counted(runner: Any) -> None:
    runner.execute_model(output(a=8), None, True)
    runner.execute_model(output(a=8), dummy_run=True)
    assert said(runner) == ["dummy", "dummy"]


def test_a_step_without_tokens_tells_which_requests_have_ended(runner: Any) -> None:
    runner.execute_model(output())
    assert said(runner) == ["dummy", "step"]


def test_warming_kernels_up_is_no_work(runner: Any) -> None:
    """vLLM sends itself requests at start-up, through the same calls as real ones."""

    def warmup_kernels(model_runner: Any, execute_model: Any, sample_tokens: Any) -> str:
        for step in (output(_warmup_0_=2, _warmup_1_=2), output(_warmup_0_=1, _warmup_1_=1), output()):
            execute_model(step)
        return "warm"

    module: Any = SimpleNamespace(warmup_kernels=warmup_kernels)
    runner_v2.patch_warmup(module)
    patched = module.warmup_kernels
    runner_v2.patch_warmup(module)
    assert module.warmup_kernels is patched, "patched once"
    assert patched(runner, runner.execute_model, None) == "warm"
    assert said(runner) == ["dummy"] * 3
    runner.prepared = SimpleNamespace(num_tokens=2)
    runner.execute_model(output(a=2))
    assert said(runner) == ["step", ("pass", 2), ("rows", runner.prepared), ("end", 2)]


def test_a_warm_up_that_fails_leaves_counting_on(runner: Any) -> None:
    def warmup_kernels(model_runner: Any, *_: Any) -> None:
        raise RuntimeError("out of memory")

    module: Any = SimpleNamespace(warmup_kernels=warmup_kernels)
    runner_v2.patch_warmup(module)
    with pytest.raises(RuntimeError, match="out of memory"):
        module.warmup_kernels(runner, None, None)
    runner.execute_model(output(a=2))
    assert ("pass", 2) in said(runner)


def test_an_unmonitored_runner_warms_up_as_ever() -> None:
    module: Any = SimpleNamespace(warmup_kernels=lambda model_runner, *_: "warm")
    runner_v2.patch_warmup(module)
    assert module.warmup_kernels(RunnerV2(), None, None) == "warm"
