"""The fuse: what stands between a failing monitor and the process it runs in.

Every hook on the serving path runs under the fuse. The first failure blows it: it is counted, said once in the log,
and from then on every hook returns on its first line. Serving goes on without the monitor.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable

from moe_monitor.snapshot import Status

#: A hook takes microseconds on GPUs and a millisecond or two on CPUs. One that runs for so long, in seconds, hangs.
HOOK_SECONDS = 10.0


class HookHung(Exception):
    """Raised inside a hook that does not come back."""


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
        #: (thread, since) of the hook that runs now, if any; one thread runs them all.
        self.inside: tuple[int, float] | None = None
        self._interrupted = False

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

    def guard(self, where: str, *, serving: bool = True, on_error: Callable[[Exception], None] | None = None) -> Guard:
        """Run a hook: what it raises blows the fuse, or goes to ``on_error``, instead of reaching the caller.

        Its host time is counted, apart for serving and for starting up.
        """
        return Guard(self, where, serving, on_error)

    def interrupt_hung(self) -> None:
        """Raise HookHung in a hook on the serving path that runs for longer than HOOK_SECONDS; call now and then.

        That ends what hangs in Python: an endless loop, or a wait that polls. What hangs inside a C function cannot
        be interrupted from within its process; it gets the exception once the function returns.
        """
        inside = self.inside
        if inside is None or self._interrupted or time.perf_counter() - inside[1] < HOOK_SECONDS:
            return
        with self._lock:
            # First this, which a hook that ends looks at after it has cleared `inside`: so either it sees this, or its
            # end is seen here. What is raised must not hit the next hook, nor vLLM's own code after it.
            self._interrupted = True
            if self.inside is inside:
                _raise_in(inside[0], HookHung)
            else:
                self._interrupted = False

    def leave(self, where: str) -> None:
        """The hook has ended: what was raised in its thread but did not arrive must not hit vLLM's code."""
        try:
            self.inside = None
            if not self._interrupted:
                return
            with self._lock:
                if self._interrupted:
                    _raise_in(threading.get_ident(), None)
                self._interrupted = False
        except HookHung as error:  # it arrived here
            self.inside, self._interrupted = None, False
            self.blow(where, error)


class Guard:
    """See :meth:`Fuse.guard`. A class of its own: as a generator it would take three times as long, in every step."""

    __slots__ = ("_fuse", "_on_error", "_serving", "_start", "_where")

    def __init__(self, fuse: Fuse, where: str, serving: bool, on_error: Callable[[Exception], None] | None) -> None:
        self._fuse, self._where, self._serving, self._on_error = fuse, where, serving, on_error

    def __enter__(self) -> None:
        self._start = start = time.perf_counter()
        if self._serving:
            self._fuse.inside = (threading.get_ident(), start)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if self._serving:
            self._fuse.leave(self._where)  # first: until then the hook may be interrupted
        spent = time.perf_counter() - self._start
        if self._serving:
            self._fuse.status.hook_seconds += spent
        else:
            self._fuse.startup_seconds += spent
        if not isinstance(error, Exception):
            return False
        if self._on_error is None:
            self._fuse.blow(self._where, error)
        else:
            self._on_error(error)
        return True


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    value = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), value)
