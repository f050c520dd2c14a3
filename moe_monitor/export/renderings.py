"""The exposition as it is being written: packed while the rest is still to come, and shared by all who wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

#: A reader gives up when no rendering has got on for so long, in seconds: reading boards hangs, on a broken disk say.
PATIENCE = 30.0


class RenderingError(Exception):
    """The text could not be written to its end; the cause says why, if it is not that it hangs."""


class Rendering:
    """Parts of a text that one thread makes and any number of threads read, each from its beginning.

    progress: when any rendering last got on, by the monotonic clock; shared by those that wait for each other.
    """

    def __init__(self, progress: list[float]) -> None:
        self._parts: list[bytes] = []
        self._ended = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._progress = progress

    def fill(self, parts: Iterable[bytes]) -> None:
        """Take parts until there are no more. What they raise, readers get as the cause of a RenderingError."""
        error: Exception | None = None
        try:
            for part in parts:
                self._progress[0] = time.monotonic()
                with self._changed:
                    self._parts.append(part)
                    self._changed.notify_all()
        except Exception as raised:
            error = raised
        self._progress[0] = time.monotonic()
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def __iter__(self) -> Iterator[list[bytes]]:
        """All parts that have come since the last time, at least one; waits for them. Raises RenderingError."""
        at, asked = 0, time.monotonic()
        while True:
            with self._changed:
                while len(self._parts) == at and not self._ended:
                    left = max(asked, self._progress[0]) + PATIENCE - time.monotonic()
                    if left <= 0:
                        raise RenderingError(f"reading the boards hangs: nothing came for {PATIENCE:g} s")
                    self._changed.wait(left)
                fresh = self._parts[at:]
            if not fresh:
                break
            at += len(fresh)
            yield fresh
        if self._error is not None:
            raise RenderingError("the metrics could not be written, the log says why") from self._error


class Renderings:
    """One rendering at a time, in a daemon thread. Those who ask for the same one before it has begun share it: many
    scrapes at once cost two renderings, the one that was under way and theirs.
    """

    def __init__(self, render: Callable[[bool], Iterable[bytes]]) -> None:
        self._render = render
        self._waiting: dict[bool, Rendering] = {}
        self._asked = threading.Condition()
        self._progress = [0.0]
        self._thread: threading.Thread | None = None
        self._stopped = False

    def ask(self, openmetrics: bool) -> Rendering:
        """A rendering that begins after this call; ``render`` is called with ``openmetrics``. Raises RenderingError
        after :meth:`stop`, RuntimeError where no thread can be had.
        """
        with self._asked:
            if self._stopped:
                raise RenderingError("the exporter is stopping")
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="moe-monitor-render", daemon=True)
                thread.start()
                self._thread = thread
            found = self._waiting.setdefault(openmetrics, Rendering(self._progress))
            self._asked.notify()
        return found

    def _run(self) -> None:
        while self._one():
            pass

    def _one(self) -> bool:
        """Wait for somebody to ask, and render. Keeps nothing: a text has megabytes."""
        with self._asked:
            self._asked.wait_for(lambda: self._waiting or self._stopped)
            if not self._waiting:
                return False
            openmetrics = next(iter(self._waiting))
            rendering = self._waiting.pop(openmetrics)
        rendering.fill(self._render(openmetrics))
        return True

    def stop(self) -> None:
        """End the thread once nobody waits any more."""
        with self._asked:
            self._stopped = True
            self._asked.notify()
