"""The fuse: what stands between a failing monitor and the process it runs in.

Every hook on the serving path runs under the fuse. The first failure blows it: it is counted, said once in the log,
and from then on every hook returns on its first line. Serving goes on without the monitor.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moe_monitor.snapshot import Status


class Fuse:
    """State of one monitor: intact or blown, why, and how much host time its hooks took. Thread-safe."""

    def __init__(self, logger: logging.Logger, on_blow: Callable[[], None] = lambda: None) -> None:
        self.blown = False
        self.status = Status()
        self._logger = logger
        self._lock = threading.Lock()
        self.on_blow = on_blow
        #: Host time of hooks that were called while the model was being started. Seconds.
        self.startup_seconds = 0.0

    def blow(self, where: str, error: BaseException | str) -> None:
        """Switch the monitor off because of ``error`` in ``where``."""
        with self._lock:
            first, self.blown = not self.blown, True
            self.status.errors[where] = self.status.errors.get(where, 0) + 1
            if first:
                self.status.active = False
                self.status.reason = f"{where}: {error!r}" if isinstance(error, BaseException) else f"{where}: {error}"
        if first:
            self._logger.warning(
                "moe-monitor switched itself off, serving goes on without it. Cause: %s",
                self.status.reason,
                exc_info=error if isinstance(error, BaseException) else None,
            )
            self.on_blow()

    def off(self, reason: str) -> None:
        """Switch the monitor off without an error: there is nothing here to monitor."""
        with self._lock:
            self.blown = True
            self.status.active = False
            self.status.reason = reason
        self._logger.info("moe-monitor is inactive: %s", reason)

    def count_error(self, where: str) -> None:
        """Count a failure that leaves the monitor on."""
        with self._lock:
            self.status.errors[where] = self.status.errors.get(where, 0) + 1

    def _spent(self, seconds: float, serving: bool) -> None:
        if serving:
            self.status.hook_seconds += seconds
        else:
            self.startup_seconds += seconds

    @contextmanager
    def timed(self, *, serving: bool = True) -> Iterator[None]:
        """Count the host time of a hook, apart for serving and for starting up."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent(time.perf_counter() - start, serving)

    @contextmanager
    def guard(self, where: str, *, serving: bool = True) -> Iterator[None]:
        """Run a hook, and count its time: what it raises blows the fuse instead of reaching the caller."""
        start = time.perf_counter()  # not by `timed`: this runs several times in every step
        try:
            yield
        except Exception as error:
            self.blow(where, error)
        finally:
            self._spent(time.perf_counter() - start, serving)
