"""Where in a pass the time of the thread that runs the model goes: marks around vLLM's own steps, the same with the
monitor on and off. For ``in_place.py --segments``.

``mark`` and ``unmark`` run in a worker (``LLM.collective_rpc``), the former after switching.switch. A mark is a look at
the clocks and an append; what is around them is vLLM and, where it is on, the monitor.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

#: Methods of a model runner, of which each has those that are around or within a pass.
STEPS = ("execute_model", "prepare_inputs", "_model_forward", "sample_tokens")


def _now() -> tuple[float, float, int]:
    """Of this thread: ms on the wall and of the processor, page faults."""
    return 1e3 * time.perf_counter(), 1e3 * time.thread_time(), resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def _around(original: Callable[..., Any], begin: str, end: str, marks: list[Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def marked(*args: Any, **kwargs: Any) -> Any:
        marks.append((begin, *_now()))
        result = original(*args, **kwargs)
        marks.append((end, *_now()))
        return result

    return marked


def _taken() -> dict[str, float]:
    """What this thread has had of the system so far."""
    import torch

    host, device = torch.cuda.host_memory_stats(), torch.cuda.memory_stats()
    thread = resource.getrusage(resource.RUSAGE_THREAD)
    return {
        "host_allocs": host.get("num_host_alloc", 0),
        "host_alloc_us": host.get("host_alloc_time.total", 0),
        "device_allocs": device.get("num_device_alloc", 0),
        "page_faults": thread.ru_minflt,
        "system_ms": 1e3 * thread.ru_stime,
        "waits": thread.ru_nvcsw,
        "switched_out": thread.ru_nivcsw,
    }


def _noting_kind(original: Callable[..., Any], kinds: list[str]) -> Callable[..., Any]:
    """Around ``execute_model``: whether a pass brings requests."""

    @functools.wraps(original)
    def noted(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        kinds.append("new" if scheduler_output.scheduled_new_reqs else "old")
        return original(scheduler_output, *args, **kwargs)

    return noted


def mark(worker: Any) -> None:
    """Put marks around a pass."""
    runner = worker.model_runner
    marks: list[Any] = []
    kinds: list[str] = []
    undo: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, begin: str, end: str) -> None:
        undo.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, _around(getattr(owner, name), begin, end, marks))

    for name in STEPS:
        if hasattr(runner, name):
            put(runner, name, name, f"{name} end")
    runner.execute_model = _noting_kind(runner.execute_model, kinds)
    capture = runner._moe_monitor
    routers = [owner for owner, name, _ in capture._wrapping._replaced if name == "_compute_routing"]
    for at, router in enumerate(routers):
        put(router, "_compute_routing", f"router {at}", f"router {at} end")
    collections = [0, 0.0]

    def collected(phase: str, _: dict[str, int]) -> None:
        collections[1] += time.perf_counter() * (1 if phase == "stop" else -1)
        collections[0] += phase == "stop"

    gc.callbacks.append(collected)
    worker._marks = marks, kinds, undo, collected, collections, _taken()


def unmark(worker: Any) -> dict[str, Any]:
    """Take them off. ``parts``: by kind of pass (without a graph: "bare"; with one: "new" if it brings requests, else
    "old") and by where a part begins and ends, what it took: ms on the wall, ms of the processor, page faults;
    [passes]. "whole" is from the beginning of a pass to that of the next.
    """
    marks, kinds, undo, collected, collections, before = worker._marks
    taken = {name: value - before[name] for name, value in _taken().items()}
    gc.callbacks.remove(collected)
    for owner, name, was in reversed(undo):
        delattr(owner, name) if was is None else setattr(owner, name, was)
    passes: list[list[tuple[Any, ...]]] = []
    for point in marks:
        if point[0] == "execute_model":
            passes.append([])
        if passes:
            passes[-1].append(point)
    parts: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    for kind, points, following in zip(kinds, passes, passes[1:], strict=False):  # nothing follows the last
        routed = any(name.startswith("router") for name, *_ in points)
        of_kind = parts.setdefault("bare" if routed else kind, {})
        between = [*itertools.pairwise([*points, following[0]]), (("whole", *points[0][1:]), following[0])]
        for (first, *since), (second, *until) in between:
            spent = tuple(b - a for a, b in zip(since, until, strict=True))
            of_kind.setdefault("whole" if first == "whole" else f"{first} - {second}", []).append(spent)
    return {"parts": parts, "collections": collections[0], "collecting_ms": 1e3 * collections[1], **taken}


def summarise(found: dict[str, list[dict[str, Any]]], concurrency: int) -> None:
    """Print what :func:`unmark` found: of each kind of pass, part and mode the medians of a pass. The rest are
    sums of a round.
    """
    for mode, rounds in found.items():
        row: dict[str, Any] = {"concurrency": concurrency, "mode": mode, "rounds": len(rounds)}
        row |= {key: round(statistics.fmean(r[key] for r in rounds), 2) for key in rounds[0] if key != "parts"}
        print("SEGMENTS", json.dumps(row), flush=True)
    kinds: dict[str, dict[str, None]] = {}  # in the order of a pass
    for told in itertools.chain(*found.values()):
        for kind, parts in told["parts"].items():
            kinds.setdefault(kind, {}).update(dict.fromkeys(parts))
    for kind, parts in kinds.items():
        for part in parts:
            row = {"concurrency": concurrency, "kind": kind, "part": part}
            for mode, rounds in found.items():
                spent = [taken for r in rounds for taken in r["parts"].get(kind, {}).get(part, ())]
                row[mode] = [round(statistics.median(column), 4) for column in zip(*spent, strict=True)]
                row[f"{mode} passes"] = len(spent)
            print("SEGMENT", json.dumps(row), flush=True)
