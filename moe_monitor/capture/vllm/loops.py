"""Seam: the loops of engine cores and workers (``vllm.v1.engine.core``, ``vllm.v1.executor.multiproc_executor``), in
which the model is run. They get room for their frames.

CPython keeps the frames of a thread in chunks of 16 KiB. A call whose frame does not fit has another chunk mapped, and
its return has it unmapped: microseconds instead of nanoseconds, and translations of addresses are flushed
(https://github.com/python/cpython/issues/142183; newer patch releases keep one chunk at hand). Which calls that hits is
a matter of what lies below them: a function of ours around one of vLLM's moves the edge, and a pass may become longer,
or shorter, by much more than the function takes. So the loops run on top of a frame so large that the chunk made for it
has room for all of theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from moe_monitor.capture.vllm.plugin import SENTINEL

#: Slots of the large frame, of 8 bytes each: with them and what it keeps free, CPython makes the chunk one of 256 KiB,
#: of which more than 128 KiB are left. (It doubles 16 KiB until the frame and 1,000 slots fit.) No larger one, since a
#: profiler (echion) copies chunks up to that size; what is not used takes no memory.
_SLOTS = 15_500


def roomy(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, called on top of a large frame. For what runs long: to make and unmap the chunk takes a while."""

    def with_room_for_frames(*args: Any, **kwargs: Any) -> Any:  # seen in tracebacks
        return function(*args, **kwargs)

    with_room_for_frames.__code__ = with_room_for_frames.__code__.replace(co_stacksize=_SLOTS)
    return functools.wraps(function)(with_room_for_frames)


def patch_core(module: ModuleType) -> None:
    """Hook for ``vllm.v1.engine.core``: the loop of an engine core, which runs the model where there is one worker, and
    that of data-parallel ones.
    """
    for cls in module.EngineCoreProc, module.DPEngineCoreProc:
        _give_room(cls, "run_busy_loop")


def patch_workers(module: ModuleType) -> None:
    """Hook for ``vllm.v1.executor.multiproc_executor``: the loop of a worker process."""
    _give_room(module.WorkerProc, "worker_busy_loop")


def _give_room(cls: type, name: str) -> None:
    original = getattr(cls, name)
    if hasattr(original, SENTINEL):
        return
    replacement = roomy(original)
    setattr(replacement, SENTINEL, original)
    setattr(cls, name, replacement)
