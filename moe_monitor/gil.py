"""Being a good neighbour in somebody else's process: threads of ours share Python's lock with the serving path."""

from __future__ import annotations

import math
import time


def let_others() -> None:
    """Hand over Python's lock. A thread that computes keeps it for 5 ms whenever another wants it, and an event loop
    wants it again after every byte that it sends. Sleeping, however briefly, hands it over at once.
    """
    time.sleep(0.0001)


class Turns:
    """:func:`let_others`, but no more often than every ``hold`` seconds, waits for the lock included: each time costs a
    wake-up.
    """

    def __init__(self, hold: float = 0.0003) -> None:
        self._hold = hold
        self._since = -math.inf

    def __call__(self) -> None:
        if time.perf_counter() - self._since >= self._hold:
            let_others()
            self._since = time.perf_counter()
