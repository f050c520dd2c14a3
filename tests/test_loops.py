"""Room for frames. That vLLM's loops have it when they run the model: test_vllm_servers.py."""

from __future__ import annotations

import resource
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from moe_monitor.capture.vllm.loops import patch_core, patch_workers, roomy


def leaf(value: int) -> int:
    return value


def faults(calls: int) -> int:
    """Page faults of this thread while another function is called so often, from here."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(calls):
        leaf(1)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def at_depth(depth: int, calls: int) -> int:
    return at_depth(depth - 1, calls) if depth else faults(calls)


def edges() -> list[int]:
    """Depths up to 400 frames from here, well above vLLM's, at which nearly every call is a page fault."""
    return [depth for depth in range(400) if at_depth(depth, 100) > 90]


def test_no_call_within_meets_the_edge_of_a_chunk() -> None:
    if not edges():
        pytest.skip(f"Python {sys.version.split()[0]} keeps a chunk of frames at hand")
    assert roomy(edges)() == []


def test_arguments_results_and_exceptions_pass() -> None:
    def add(a: int, *, b: int) -> int:
        "Adds."
        return a + b

    made = roomy(add)
    assert (made(1, b=2), made.__name__, made.__doc__) == (3, "add", "Adds.")
    with pytest.raises(TypeError, match="b"):
        made(1)


class Core:
    def run_busy_loop(self) -> Any:
        """Until it is told to end."""
        frame, most = sys._getframe(), 0
        while frame is not None:
            frame, most = frame.f_back, max(most, frame.f_code.co_stacksize)
        return most, self

    worker_busy_loop = run_busy_loop


@pytest.mark.parametrize("own", [True, False], ids=["its own loop", "the other's"])
def test_each_loop_gets_room_once(own: bool) -> None:
    def other(core: Any) -> Any:
        return Core.run_busy_loop(core)

    loops: list[Any] = [Core.run_busy_loop, other]
    first = type("First", (Core,), {"run_busy_loop": loops[0]})
    second = type("Second", (first,), {"run_busy_loop": loops[1]} if own else {})
    for _ in range(2):  # vLLM may load plug-ins more than once
        patch_core(SimpleNamespace(EngineCoreProc=first, DPEngineCoreProc=second))  # type: ignore[arg-type]
    for cls, loop in (first, loops[0]), (second, loops[1] if own else loops[0]):
        assert cls.run_busy_loop.__wrapped__ is loop  # type: ignore[attr-defined]
        core = cls()
        room, ran = core.run_busy_loop()
        assert room > 10_000
        assert ran is core


def test_a_worker_gets_room() -> None:
    worker = type("Worker", (Core,), {})
    patch_workers(SimpleNamespace(WorkerProc=worker))  # type: ignore[arg-type]
    assert worker().worker_busy_loop()[0] > 10_000


def test_versions_without_these_loops_are_left_alone() -> None:
    class EngineCoreProc(Core): ...

    plain = EngineCoreProc.run_busy_loop
    with pytest.raises(AttributeError, match="DPEngineCoreProc"):
        patch_core(SimpleNamespace(EngineCoreProc=EngineCoreProc))  # type: ignore[arg-type]
    assert EngineCoreProc.run_busy_loop is plain
    assert Core().run_busy_loop()[0] < 10_000
