"""How long a thread keeps Python's lock between two offers of it, in processor time: other load does not matter."""

from __future__ import annotations

import time


class Stretches:
    """Call :meth:`pause` in place of ``let_others``; ``found`` has the processor time since the call before."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.found: list[float] = []
        self._begun = self._last = time.thread_time()

    def pause(self) -> None:
        now = time.thread_time()
        self.found.append(now - self._last)
        self._last = time.thread_time()

    def end(self) -> float:
        """The last stretch is over; processor time of all."""
        self.pause()
        whole = self._last - self._begun
        print(f"{1000 * whole:.0f} ms in {len(self.found)} stretches, the longest {1000 * max(self.found):.1f} ms")
        return whole
