"""The short ways of the hooks, which most passes of a server take.

Between two passes lie milliseconds of other work, so a hook finds nothing of its own in the processor's caches, and how
long it takes is how much it touches: objects, and code no less, of which every call of a function is a good part. So
where vLLM is left there is one function that does all that most passes need, with what it works with bound: here for
replays and routers, in the seams of the model runners for what is around a pass. In any other pass it does nothing, and
calls the general hook instead. The rule of all: a pass that begins with ``meter.clean`` is short, until something sets
that to False.

Nothing here waits, so nothing needs the guard against what hangs; what fails blows the fuse. Only what is told before a
replay is in ``hook_seconds``: the rest are a few instructions each, and to take the time would take as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from moe_monitor.capture.mailbox import AHEAD, PLACES
from moe_monitor.capture.retained import Span

if TYPE_CHECKING:
    from moe_monitor.capture.cuda import CudaMeter
    from moe_monitor.capture.fuse import Fuse
    from moe_monitor.capture.replays import Replay, Watched
    from moe_monitor.capture.retained import Retained
    from moe_monitor.capture.tallies import Owners

#: A pass that will not come.
NEVER = 1 << 62

#: Where a router sees this rank's tokens and no others.
WHOLE = Span()


class Timing(Protocol):
    """``passes`` have begun, of which none before the one with the number ``soonest`` is timed."""

    passes: int
    soonest: int


class Untimed:
    """Where nothing is timed."""

    passes, soonest = 0, NEVER


class Unmetered:
    """Where no pass is short: on CPUs, and where nothing is counted."""

    clean = False
    counted: Any = None
    valid, passes, turn = 0, 0, -1


class _Untraced:
    owners: Owners | None = None


def replaying(
    meter: CudaMeter, graph: Retained, fuse: Fuse, watched: Watched, own: Replay, otherwise: Replay
) -> Replay:
    """What replays a sealed graph: ``own`` is the replay of torch's, ``otherwise`` the one that is ``watched``."""
    mailbox, status = graph.mailbox, fuse.status
    tallies: Any = _Untraced() if meter.tallies is None else meter.tallies
    assert mailbox is not None
    words, begun, whole, clock = mailbox.words, mailbox.begun, graph.whole, time.perf_counter

    def replay(self: Any) -> None:
        start, posted_quickly = clock(), False
        try:
            tokens, posted, owners = meter.valid, mailbox.posted, tallies.owners
            if (
                whole
                and tokens
                and meter.clean
                and meter.counted is None
                and not mailbox.unsent
                and not fuse.blown
                and 0 <= posted - begun[0] < AHEAD
                and (owners is None or tokens <= owners.rows)
            ):
                word = tokens
                if owners is not None:
                    if owners.spans is not mailbox.spans:
                        mailbox.attribute(owners, 0, 0)
                    word |= tokens << 24 | mailbox.told
                words[posted % PLACES] = word
                mailbox.posted = posted + 1
                meter.counted = graph
                status.hook_seconds += clock() - start
                posted_quickly = True
        except Exception as error:
            fuse.blow("record", error)
        if not posted_quickly:
            otherwise(self)
            return
        try:
            own(self)
        except Exception as error:
            if watched.failed is not None:
                watched.failed(error)
            raise

    return replay


Routing = Callable[..., tuple[Any, Any]]


def routing(
    meter: CudaMeter, position: int, original: Routing, otherwise: Routing, split: Callable[[], bool] | None = None
) -> Routing:
    """A router in a pass without a graph: the decision of a layer that comes after the one before (``meter.turn``) is
    kept, as :meth:`~moe_monitor.capture.cuda.CudaMeter.collect` would, for the end of the pass. ``original`` is vLLM's,
    ``otherwise`` the general hook around it. ``split`` tells whether the pass is one of those that are not captured;
    None, where routers may see other ranks' tokens: the first layer's decision goes the general way then.
    """
    pending, addresses, place, following = meter.pending, meter.addresses, 2 * position, position + 1

    def begins(logits: Any) -> bool:
        if split is None:
            return False
        try:
            if logits.shape[0] > meter.few or split():
                return False
        except Exception:  # the general hook will meet it, too, and say so
            return False
        meter.clean = False
        return True

    def compute_routing(hidden_states: Any, router_logits: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if meter.turn != position or (position == 0 and not begins(router_logits)):
            return otherwise(hidden_states, router_logits, *args, **kwargs)
        decision = original(hidden_states, router_logits, *args, **kwargs)
        try:
            ids = decision[1]
            pending[position] = router_logits, ids, WHOLE
            if router_logits.is_contiguous() and ids.is_contiguous():  # asked now, while they are in the caches
                addresses[place], addresses[place + 1] = router_logits.data_ptr(), ids.data_ptr()
                meter.turn = following
            else:
                meter.turn = -1
        except Exception:  # the end of the pass will meet it, too
            meter.turn = -1
        return decision

    return compute_routing
