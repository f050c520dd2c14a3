"""Which requests are traced, and what becomes of them: sampling, slots, rows of a pass, hand-over.

Knows nothing of vLLM or of devices. The thread that runs the model calls :meth:`Tracer.step` and :meth:`Tracer.rows`;
the publisher's thread calls :meth:`Tracer.drain`.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from zlib import crc32

from numpy.typing import NDArray

from moe_monitor.capture.tallies import Owners, Spans, Store
from moe_monitor.records import Meta, Tally, short_id
from moe_monitor.snapshot import Status

#: Name of the wish in a request's ``vllm_xargs``.
WISH = "moe_trace"

#: A traced request without a token for so long is given up: its end got lost. Seconds, and how often this is looked at.
LOST_AFTER, LOOK_FOR_LOST = 3600.0, 60.0

_WISHES = {0: False, 1: True, "0": False, "1": True, "false": False, "true": True}

#: By so many places at most a request is looked for ahead of where it was; beyond, all are looked through.
_NEAR = 8

#: 2**64 over the golden ratio, odd.
_GOLDEN = 0x9E3779B97F4A7C15

#: vLLM names the sequences of a request with n > 1 by a number in front of the request's own id.
_SIBLING = re.compile(r"^\d+_")


class New(NamedTuple):
    """A request that is scheduled for the first time; ``cached``: tokens found in the prefix cache."""

    id: str
    prompt_tokens: int
    cached: int
    extra_args: Mapping[str, Any] | None


def wish(extra_args: Mapping[str, Any] | None) -> bool | None:
    """What the request itself asks for; None when it does not say. Raises ValueError for what is neither 1 nor 0."""
    value = None if extra_args is None else extra_args.get(WISH)
    if value is None:
        return None
    try:
        return _WISHES[value.strip().lower() if isinstance(value, str) else value]
    except (KeyError, TypeError):
        raise ValueError(f"{WISH} must be 1 or 0") from None


def chosen(request_id: str, ratio: float) -> bool:
    """Whether chance picks this request: a hash, so that all ranks agree. Sequences of one request share their fate.

    A hash of few instructions: this runs once a request, when nothing of it is in the processor's caches.
    """
    if ratio <= 0:
        return False
    if request_id[:1].isdigit():  # rarely; the pattern alone would take as long as the rest
        request_id = _SIBLING.sub("", request_id)
    # CRC-32 is linear, so of ids that are numbers in a row neighbours would share their fate: mixed by Knuth's
    # multiplicative hash, of which the middle bits are taken.
    mixed = (crc32(request_id.encode("utf-8", "replace")) * _GOLDEN >> 16) & 0xFFFFFFFF
    return mixed < ratio * 2.0**32


@dataclass
class _Traced:
    id: str
    slot: int
    prompt_tokens: int
    cached: int
    started: float
    seen: float
    preemptions: int = 0


class Tracer:
    """The traced requests of one rank.

    store: where they are tallied. dropped: counters of what is given up (of the rank's :class:`Status`). possible:
    asked before a request is taken; False: none is, and those that asked for it count as dropped.
    """

    def __init__(
        self,
        store: Store,
        ratio: float,
        status: Status,
        *,
        possible: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._ratio = ratio
        self._status = status
        self._possible = possible
        self._clock = clock
        self._looked = clock()
        self._free = deque(range(store.slots))
        #: Those in flight, by id. While there are none, a step that brings none needs neither :meth:`step` nor
        #: :meth:`rows`.
        self.live: dict[str, _Traced] = {}
        self._slot_of: dict[str, int] = {}
        self._prompts = [0] * store.slots  # by slot
        self._done: deque[tuple[int, Meta | None]] = deque()
        #: Every traced request is in the batch, at these (place, id, slot) by their order, and none is in its prompt.
        self._placed = False
        self._at: list[tuple[int, str, int]] = []
        #: Whose the rows of a pass are that has one for each request, with those places.
        self._single: Owners | None = None

    @property
    def pending(self) -> bool:
        """Whether :meth:`drain` has something to do."""
        return bool(self._done)

    @property
    def pressing(self) -> bool:
        """Whether a quarter of all slots waits for :meth:`drain`, or some do and no more than that is free."""
        waiting, free, quarter = len(self._done), len(self._free), self._store.slots / 4
        return waiting >= quarter or (waiting > 0 and free <= quarter)

    # the thread that runs the model

    def traces_any(self, ids: Collection[str]) -> bool:
        return not self.live.keys().isdisjoint(ids)

    def misses_some(self) -> bool:
        """Whether it is time to look for requests whose end got lost."""
        return self._clock() - self._looked >= LOOK_FOR_LOST

    def concerns(self, request_id: str, extra_args: Mapping[str, Any] | None) -> bool:
        """Whether :meth:`step` must be told of a request that is scheduled: of most it need not."""
        if request_id in self.live or (extra_args is not None and WISH in extra_args):
            return True
        return chosen(request_id, self._ratio)

    def step(
        self,
        new: Iterable[New],
        preempted: Collection[str],
        finished: Collection[str],
        scheduled: Collection[str],
    ) -> None:
        """What the scheduler decided for the coming step, with or without a pass. ``new``: those that it concerns.
        A step of which nothing concerns traced requests need not be told.
        """
        self._store.set_rows(None)  # until :meth:`rows` says more
        if self.live:
            for name in finished:
                self._end(name)
            for name in preempted:
                if name in self.live:
                    self.live[name].preemptions += 1
                    self._placed = False
            if self.misses_some():
                self._looked = now = self._clock()
                self._give_up_lost(scheduled, now)
        for request in new:
            self._admit(request)

    def _admit(self, request: New) -> None:
        if request.id in self.live:  # resumed after preemption, or one more turn of a session
            self._placed = False
            self.live[request.id].prompt_tokens = request.prompt_tokens
            self._prompts[self._slot_of[request.id]] = request.prompt_tokens
            return
        try:
            wanted = wish(request.extra_args)
        except ValueError:
            wanted = None
            self._drop("bad_moe_trace")
        if not (chosen(request.id, self._ratio) if wanted is None else wanted):
            return
        if not self._possible():
            if wanted:  # what chance alone would have picked is no loss
                self._drop("traced_requests")
            return
        if not self._free:
            self._drop("traced_requests")
            return
        self._placed = False
        slot = self._free.popleft()
        self.live[request.id] = _Traced(
            request.id, slot, request.prompt_tokens, request.cached, time.time(), self._clock()
        )
        self._slot_of[request.id], self._prompts[slot] = slot, request.prompt_tokens
        self._status.sampled += 1

    def _end(self, request_id: str) -> None:
        traced = self.live.pop(request_id, None)
        if traced is None:
            return
        del self._slot_of[request_id]
        self._placed = False
        meta = Meta(
            id=short_id(traced.id),
            prompt_tokens=traced.prompt_tokens,
            cached_tokens=traced.cached,
            preemptions=traced.preemptions,
            started=traced.started,
            finished=time.time(),
        )
        self._done.append((traced.slot, meta))

    def _give_up_lost(self, scheduled: Collection[str], now: float) -> None:
        for request_id, traced in list(self.live.items()):
            if request_id in scheduled:
                traced.seen = now
            elif now - traced.seen >= LOST_AFTER:
                del self.live[request_id], self._slot_of[request_id]
                self._placed = False
                self._done.append((traced.slot, None))
                self._drop("lost_requests")

    def _drop(self, what: str) -> None:
        self._status.dropped[what] = self._status.dropped.get(what, 0) + 1

    def rows(
        self,
        ids: Sequence[str],
        tokens: int,
        scheduled: Mapping[str, int],
        computed: NDArray[Any],
        *,
        total: int,
        index: Mapping[str, int] | None = None,
        starts: Sequence[int] | None = None,
    ) -> None:
        """Whose the rows of the coming pass are: ``scheduled[id]`` rows for each of ``ids``, in this order, beginning
        at position ``computed`` of the request; ``tokens`` in all, of ``total`` that were scheduled. Where they are
        known: ``index``, places in ``ids``; ``starts``, the first row of each of ``ids``, and one more for the end.
        """
        owners = None
        if self.live:
            single = tokens == total == len(ids)  # a row for each request
            placed = self._placed and self._stay(ids) and (single or self._beyond_prompts(computed))
            self._placed = placed
            if placed and single:
                owners = self._single or Owners(tokens, [(at, at + 1, 2 * slot + 1) for at, _, slot in self._at])
                if owners.rows != tokens:
                    owners = Owners(tokens, owners.spans)
            else:
                bounds = range(tokens + 1) if single else self._bounds(ids, tokens, scheduled, total, starts)
                if bounds is not None:
                    owners = self._attribute(ids, tokens, bounds, computed, index)
            if single or not placed:
                self._single = owners if self._placed and single else None
        self._store.set_rows(owners)

    def _stay(self, ids: Sequence[str]) -> bool:
        """Whether the traced requests are where they were, or some places ahead because others have left (then those
        are noted). Others may come and go.
        """
        most, ahead, moved = len(ids), 0, []
        for was, name, slot in self._at:
            at = was - ahead
            while at >= most or ids[at] != name:
                at, ahead = at - 1, ahead + 1
                if ahead > _NEAR or at < 0:
                    return False
            moved.append((at, name, slot))
        if ahead:
            self._at, self._single = moved, None
        return True

    def _beyond_prompts(self, computed: NDArray[Any]) -> bool:
        """Whether traced requests still are: one whose cached keys could not be loaded is set back unannounced."""
        prompts = self._prompts
        return all(computed.item(at) >= prompts[slot] for at, _, slot in self._at)

    def _bounds(
        self, ids: Sequence[str], tokens: int, scheduled: Mapping[str, int], total: int, starts: Sequence[int] | None
    ) -> Sequence[int] | None:
        """The first row of each of ``ids``, and the end. None where the model runner dropped rows and does not say
        whose: better no attribution than a wrong one.
        """
        if starts is None:
            starts = [0, *itertools.accumulate(map(scheduled.__getitem__, ids))]
        if tokens == total == starts[len(ids)]:
            return starts
        self._drop("unattributed_passes")
        return None

    def _attribute(
        self,
        ids: Sequence[str],
        tokens: int,
        bounds: Sequence[int],
        computed: NDArray[Any],
        index: Mapping[str, int] | None,
    ) -> Owners | None:
        """Most requests are not traced, and under load the batch changes in every pass: so what can be is done for the
        traced ones alone.
        """
        if self._placed:
            return Owners(tokens, [(bounds[at], bounds[at + 1], 2 * slot + 1) for at, _, slot in self._at])
        places, prompts, decoding = self._places(ids, index), self._prompts, True
        spans: Spans = []
        for at, slot in places:
            start, stop = bounds[at], bounds[at + 1]
            prompt_end = start + prompts[slot] - computed.item(at)
            if prompt_end <= start:
                spans.append((start, stop, 2 * slot + 1))
                continue
            decoding = False
            spans.append((start, min(prompt_end, stop), 2 * slot))
            if prompt_end < stop:
                spans.append((prompt_end, stop, 2 * slot + 1))
        self._placed = decoding and len(places) == len(self._slot_of)
        if self._placed:
            self._at = sorted((at, ids[at], slot) for at, slot in places)
        return Owners(tokens, spans) if spans else None

    def _places(self, ids: Sequence[str], index: Mapping[str, int] | None) -> list[tuple[int, int]]:
        """(place in ``ids``, slot) of the traced requests that are among them."""
        slot_of = self._slot_of
        if index is None:
            return [(at, slot_of[name]) for at, name in enumerate(ids) if name in slot_of]
        places = []
        for name, slot in slot_of.items():
            at = index.get(name)
            if at is None:
                continue  # waiting for its turn
            if ids[at] != name:
                raise ValueError(f"the batch says that {name!r} is at {at}, where {ids[at]!r} is")
            places.append((at, slot))
        return places

    # the publisher's thread

    def drain(self, limit: int) -> list[Tally]:
        """At most ``limit`` finished requests with their tallies; their slots are free afterwards."""
        done = [self._done.popleft() for _ in range(min(limit, len(self._done)))]
        if not done:
            return []
        taken = self._store.take([slot for slot, _ in done])
        self._free.extend(slot for slot, _ in done)
        return [Tally(meta, *tally) for (_, meta), tally in zip(done, taken, strict=True) if meta is not None]
