"""The short ways of the hooks, which most passes of a server take.

Between two passes lie milliseconds of other work, so a hook finds nothing of its own in the processor's caches, and how
long it takes is how much it touches: objects, and code no less. So for each place where vLLM is left there is one
function here, with what it works with bound, that does all that most passes need. In any other pass it does nothing,
and calls the general hook (``otherwise``) instead.

Nothing here waits, so nothing needs the guard against what hangs; what fails blows the fuse. Only what is told before a
replay is in ``hook_seconds``: the rest are assignments, and to take the time would double theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from moe_monitor.capture.mailbox import AHEAD, PLACES

if TYPE_CHECKING:
    from moe_monitor.capture.cuda import CudaMeter
    from moe_monitor.capture.fuse import Fuse
    from moe_monitor.capture.retained import Retained
    from moe_monitor.capture.tallies import Owners


#: A pass that will not come.
NEVER = 1 << 62


class Timing(Protocol):
    """``passes`` have begun, of which none before the one with the number ``soonest`` is timed.

    ``scheduled``: tokens by request of the step to come.
    """

    passes: int
    soonest: int
    scheduled: Mapping[str, int]


class Untimed:
    """Where nothing is timed."""

    passes, soonest = 0, NEVER
    scheduled: Mapping[str, int] = {}


class _Untraced:
    owners: Owners | None = None


def begin_step(
    live: Collection[str], timing: Timing, fuse: Fuse, otherwise: Callable[[Any], None]
) -> Callable[[Any], None]:
    """For every output of the scheduler. ``live``: the traced requests, as they come and go."""

    def begin(scheduled: Any) -> None:
        try:
            if not fuse.blown and not live and not scheduled.scheduled_new_reqs:
                timing.scheduled = scheduled.num_scheduled_tokens
                return
        except Exception as error:
            fuse.blow("requests", error)
        otherwise(scheduled)

    return begin


def begin_pass(meter: CudaMeter, timing: Timing, fuse: Fuse, otherwise: Callable[[int], None]) -> Callable[[int], None]:
    """For every real pass of so many tokens."""

    def begin(tokens: int) -> None:
        passes = timing.passes + 1
        if meter.clean and passes < timing.soonest and not fuse.blown:
            timing.passes = passes
            meter.counted, meter.valid = None, tokens
        else:
            otherwise(tokens)

    return begin


def before_replay(
    meter: CudaMeter, graph: Retained, fuse: Fuse, otherwise: Callable[[Retained], None]
) -> Callable[[], None]:
    """For every replay of a sealed graph."""
    mailbox, status = graph.mailbox, fuse.status
    tallies: Any = _Untraced() if meter.tallies is None else meter.tallies
    assert mailbox is not None
    words, begun, whole, clock = mailbox.words, mailbox.begun, graph.whole, time.perf_counter

    def before() -> None:
        start = clock()
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
                return
        except Exception as error:
            fuse.blow("record", error)
        otherwise(graph)

    return before


def end_pass(meter: CudaMeter, fuse: Fuse, otherwise: Callable[[int], None]) -> Callable[[int], None]:
    """For every real pass that has run, with so many tokens."""

    def end(tokens: int) -> None:
        # then the graph has counted them
        if meter.clean and meter.counted is not None and meter.valid == tokens and not fuse.blown:
            meter.valid = 0
            meter.passes += 1
        else:
            otherwise(tokens)

    return end
