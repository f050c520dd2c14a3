"""The exposition as it is being written: packed while the rest is still to come, and shared by all who wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

#: A reader gives up when nothing came for so long, in seconds: reading boards hangs, on a broken disk for example.
PATIENCE = 30.0


class RenderingError(Exception):
    """The text could not be written to its end; the cause says why."""


class Rendering:
    """Parts of a text that one thread makes and any number of threads read, each from its beginning."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._ended = False
        self._error: Exception | None = None
        self._changed = threading.Condition()

    def fill(self, parts: Iterable[bytes]) -> None:
        """Take parts until there are no more. What they raise, readers get as the cause of a RenderingError."""
        error: Exception | None = None
        try:
            for part in parts:
                with self._changed:
                    self._parts.append(part)
                    self._changed.notify_all()
        except Exception as raised:
            error = raised
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def __iter__(self) -> Iterator[list[bytes]]:
        """All parts that have come since the last time, at least one; waits for them. Raises RenderingError."""
        at = 0
        while True:
            with self._changed:
                come = self._changed.wait_for(lambda at=at: len(self._parts) > at or self._ended, PATIENCE)  # type: ignore[misc]
                fresh = self._parts[at:]
            if not come:
                raise RenderingError(f"reading and writing the metrics hangs: nothing came for {PATIENCE:g} s")
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
        self._thread: threading.Thread | None = None
        self._stopped = False

    def ask(self, openmetrics: bool) -> Rendering:
        """A rendering that begins after this call; ``render`` is called with ``openmetrics``."""
        with self._asked:
            found = self._waiting.setdefault(openmetrics, Rendering())
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="moe-monitor-render", daemon=True)
                self._thread.start()
            self._asked.notify()
        return found

    def _run(self) -> None:
        while True:
            with self._asked:
                self._asked.wait_for(lambda: self._waiting or self._stopped)
                if not self._waiting:
                    return
                openmetrics = next(iter(self._waiting))
                rendering = self._waiting.pop(openmetrics)
            rendering.fill(self._render(openmetrics))

    def stop(self) -> None:
        """End the thread once nobody waits any more."""
        with self._asked:
            self._stopped = True
            self._asked.notify()
