"""Switches the monitor of a running engine off and on, for benchmarks that compare an engine with itself.

``switch`` runs in a worker (``LLM.collective_rpc``); a server gets it by ``--worker-extension-cls switching.Switching``
(``POST /collective_rpc``, VLLM_SERVER_DEV_MODE=1), and its front end's part by ``--middleware switching.Middleware``
(``POST /moe_monitor/MODE``). Nothing may be in flight. Modes:

off          the model runner and the routers have their own methods and full graphs their own replay; nothing is
             published, the front end notes no request, and /metrics has vLLM's own alone. What stays: graphs have the
             monitor's branch, which finds that no token is real (what that costs, latency.py tells), graphs in pieces a
             replay that returns on its first line, V2's classes of graphs a look at whether they are to be named, and
             the loop of the engine room for its frames
again        the same: two of them show by how much a machine differs from itself
on           everything
untraced     on, and no request is traced
unpublished  on, and the publisher's thread does nothing
"""

from __future__ import annotations

import os
import time
from typing import Any, NamedTuple

from moe_monitor.capture import replays as watching

MODES = ("off", "again", "on", "untraced", "unpublished")

#: A model runner's methods with hooks around them.
HOOKED = ("execute_model", "_model_forward", "prepare_inputs")


class _Hooks(NamedTuple):
    """What is put on the objects of a worker: replaced attributes (owner, name, ours, their own or None) of the model
    ``runner`` and of ``routers``, and full ``graphs`` (graph, our class, torch's).
    """

    runner: list[tuple[Any, str, Any, Any]]
    routers: list[tuple[Any, str, Any, Any]]
    graphs: list[tuple[Any, type, type]]

    @classmethod
    def of(cls, runner: Any) -> _Hooks:
        methods = []
        for name in HOOKED:
            ours = runner.__dict__.get(name)
            if hasattr(ours, "__wrapped__"):
                methods.append((runner, name, ours, ours.__wrapped__))
        put = runner._moe_monitor._wrapping._replaced
        routers = [(owner, name, owner.__dict__[name], own) for owner, name, own in put]
        manager = getattr(runner, "cudagraph_manager", None)
        if manager is not None and hasattr(manager, "graphs"):
            graphs = list(manager.graphs.values())
        else:
            entries = getattr(runner.model, "concrete_cudagraph_entries", {})
            graphs = [entry.cudagraph for entry in entries.values() if entry.cudagraph is not None]
        watched = [graph for graph in graphs if "_moe_monitor" in graph.__dict__ and "replay" not in graph.__dict__]
        module = watching.__name__
        torchs = [next(c for c in type(graph).__mro__ if c.__module__ != module) for graph in watched]
        return cls(methods, routers, [(graph, type(graph), c) for graph, c in zip(watched, torchs, strict=True)])

    def put(self, *, on: bool) -> None:
        for owner, name, ours, own in (*self.runner, *self.routers):
            if on:
                setattr(owner, name, ours)
            elif own is None:
                owner.__dict__.pop(name, None)
            else:
                setattr(owner, name, own)
        for graph, watched, torchs in self.graphs:
            graph.__class__ = watched if on else torchs


def switch(worker: Any, mode: str) -> dict[str, Any]:
    """Returns what the monitor and the process have taken so far."""
    import torch

    assert mode in MODES, mode
    capture = worker.model_runner._moe_monitor
    publisher, meter = capture.publisher, capture.meter
    if not hasattr(capture, "_switched"):
        hooks = _Hooks.of(worker.model_runner)
        capture._switched = hooks, capture.tracer._ratio, publisher.publish, publisher.has_gathered
    hooks, ratio, publish, has_gathered = capture._switched
    off = mode in ("off", "again")
    hooks.put(on=not off)
    tracer = capture.tracer
    for name in list(tracer.live):  # their end comes with a step that is still to come
        tracer._end(name)
    meter.tallies.set_rows(None)
    meter.begin_dummy()
    graphs = getattr(meter, "graphs", None)
    if graphs is not None:
        torch.cuda.synchronize()
        meter.clean = False
        mailbox = graphs.mailbox
        for place in range(len(mailbox.words)):
            mailbox.words[place] = 0  # launches that are not posted find no tokens
        mailbox.posted = mailbox.begun[0]
    status = capture.fuse.status
    capture.fuse.blown = off
    tracer._ratio = 0.0 if mode == "untraced" else ratio
    working = not off and mode != "unpublished"
    publisher.publish = publish if working else lambda: None
    publisher.has_gathered = has_gathered if working else lambda now: False
    found = {} if graphs is None else graphs.found
    return {
        "process": time.process_time(),
        "thread": time.thread_time(),
        "hooks": status.hook_seconds,
        "passes": meter.passes,
        "errors": dict(status.errors),
        "reason": status.reason,
        "dropped": sum(status.dropped.values()),
        "capture": status.capture,
        "sealed": [sum(graph.sealed for graph in found.values()), len(found)],
        "unhooked": [len(part) for part in hooks],  # in mode off: of the model runner, of routers, graphs
        "runner": type(worker.model_runner).__module__,
        "pid": os.getpid(),
    }


class Switching:
    """Becomes a part of vLLM's worker."""

    def switch_moe_monitor(self, mode: str) -> dict[str, Any]:
        return switch(self, mode)


async def _vllms_alone(self: Any, scope: Any, receive: Any, send: Any) -> None:
    await self._app(scope, receive, send)


class Middleware:
    """Of the API server; the same for all modes."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._front: Any = None
        self._scraped: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if not path.startswith("/moe_monitor/"):
            await self._app(scope, receive, send)
            return
        from moe_monitor.capture.vllm import frontend, tracing

        off = path.rpartition("/")[2] in ("off", "again")
        self._front = self._front or tracing.front_end()
        tracing._front = None if off else self._front
        self._scraped = self._scraped or frontend.MetricsMiddleware.__call__
        frontend.MetricsMiddleware.__call__ = _vllms_alone if off else self._scraped  # type: ignore[method-assign]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
