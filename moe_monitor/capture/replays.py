"""Something to do at the replays of a captured CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

_NAME = "_moe_monitor"

Replay = Callable[[Any], None]


@dataclass
class Watched:
    """What is done at the replays of one graph: ``before`` each; ``instead`` of it, if that returns True; and with what
    a replay has ``failed``, before it is raised.
    """

    before: Callable[[], None] | None = None
    instead: Callable[[], bool] | None = None
    failed: Callable[[Exception], None] | None = None


def watch(graph: Any) -> Watched:
    """For ``graph`` (a ``torch.cuda.CUDAGraph``), to be filled in.

    The graph becomes one of a class of its own rather than getting another ``replay``: its bound method keeps the graph
    alive, and vLLM keeps no more than that of some. And nothing here does, so its memory goes when it does.
    """
    found: Watched | None = graph.__dict__.get(_NAME)
    if found is None:
        found = graph.__dict__[_NAME] = Watched()
        cls: Any = _class_of(type(graph))  # type: ignore[arg-type]  # types are hashable
        try:
            graph.__class__ = cls
        except TypeError:  # then it is the garbage collector's
            graph.replay = MethodType(cls.replay, graph)
    return found


def shorten(graph: Any, replaying: Callable[[Replay, Replay], Replay]) -> None:
    """Give a watched graph a replay of its own, made by ``replaying(own, otherwise)``: ``own`` is that of torch's
    class, ``otherwise`` does what is watched, too. Does nothing where the graph could not become of another class.
    """
    watched: Any = type(graph)
    if "replay" not in graph.__dict__:
        (own,) = watched.__bases__
        if _NAME in watched.__dict__:  # the graph has one already
            watched, (own,) = own, own.__bases__
        graph.__class__ = type(own.__name__, (watched,), {"replay": replaying(own.replay, watched.replay), _NAME: True})


@functools.cache
def _class_of(base: type[Any]) -> type[Any]:
    def replay(self: Any) -> None:
        watched: Watched = self.__dict__[_NAME]
        if watched.before is not None:
            watched.before()
        if watched.instead is not None and watched.instead():
            return
        try:
            base.replay(self)
        except Exception as error:
            if watched.failed is not None:
                watched.failed(error)
            raise

    return type(base.__name__, (base,), {"replay": replay, "__doc__": base.__doc__})
