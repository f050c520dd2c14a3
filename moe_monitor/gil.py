"""Being a good neighbour in somebody else's process: threads of ours share Python's lock with the serving path."""

from __future__ import annotations

import time


def let_others() -> None:
    """Hand over Python's lock. A thread that computes keeps it for 5 ms whenever another wants it, and an event loop
    wants it again after every byte that it sends. Sleeping, however briefly, hands it over at once.
    """
    time.sleep(0.0001)
