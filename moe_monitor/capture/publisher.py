"""The publisher: meter -> board, on a thread of its own, off the serving path."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_monitor import statistics
from moe_monitor.board import BoardError, BoardWriter, remove_dead_boards
from moe_monitor.capture.fuse import Fuse
from moe_monitor.latency import SEGMENT, LatencyTable, latency_segment
from moe_monitor.layout import FIXED_POINT, RowLayout
from moe_monitor.records import RecordWriter, Tally, record_segments
from moe_monitor.snapshot import STATUS_SEGMENT, routing_segment


class Reading(NamedTuple):
    """Counter rows [layers, width] and the number of passes that they cover."""

    rows: NDArray[np.int64]
    passes: int


class Source(Protocol):
    """Where readings come from. ``passes`` is cheap to ask for; ``read`` may wait for a device copy to arrive."""

    @property
    def passes(self) -> int: ...

    def read(self) -> Reading: ...


class Requests(Protocol):
    """Where finished traced requests come from; ``drain`` takes at most so many and may wait for a device copy.
    ``pressing``: they keep room that will soon be needed.
    """

    @property
    def pending(self) -> bool: ...

    @property
    def pressing(self) -> bool: ...

    def drain(self, limit: int) -> list[Tally]: ...


class Timings(Protocol):
    """Where durations come from: ``collect`` moves finished samples into ``table`` and says whether there were any."""

    @property
    def table(self) -> LatencyTable: ...

    def collect(self) -> bool: ...


#: What is given up (moe_monitor_dropped_total{what}) -> what the log says of it, once.
DROPPED = {
    "bad_moe_trace": "a request's moe_trace is neither 1 nor 0; it is served and sampled as if it had none",
    "traced_requests": "more requests are to be traced than can be; those over it are served untraced",
    "lost_requests": "a traced request has had no token for an hour, and no end; it is traced no longer",
    "unattributed_passes": "the model runner dropped rows of a pass without saying whose; traced requests miss it",
    "latency_samples": "a timed pass was given up because earlier ones were not yet worked off",
}

#: Finished requests are looked for so often, in seconds, whatever the publishing interval, and twice as often while
#: they press. While passes are run they are gathered for so long: taking them off the device costs the model's thread
#: some of Python's lock, however few they are.
HAND_OVER, GATHER = 0.4, 2.0


class Publisher:
    """Publishes a source to a board every ``interval`` seconds, and at once when the fuse blows.

    The board is made here, so that whoever asks finds the status of an inactive monitor too. ``source`` is None
    where there is nothing to count, ``timings`` where nothing is timed. Raises BoardError when it cannot be made.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        identity: Mapping[str, Any],
        fuse: Fuse,
        source: Source | None,
        *,
        interval: float,
        log_interval: float,
        logger: logging.Logger,
        requests: Requests | None = None,
        timings: Timings | None = None,
    ) -> None:
        self._fuse = fuse
        self._source = source
        self._interval = interval
        self._identity = identity
        self._summary = Summary(identity, log_interval, logger) if source is not None and log_interval else None
        segments: dict[str, Any] = {"status": STATUS_SEGMENT}
        if source is not None:
            segments["routing"] = routing_segment(len(identity["layers"]), RowLayout(identity["experts"]).width)
        self._requests = requests if source is not None else None
        if self._requests is not None:
            segments |= record_segments(len(identity["layers"]), identity["experts"])
        self._timings = timings
        if timings is not None:
            segments[SEGMENT] = latency_segment(len(identity["layers"]))
        self._logger = logger
        self._make_board = lambda: BoardWriter(directory, name, identity, segments)
        self._board = self._make_board()
        self._records = RecordWriter(self._board, segments)
        remove_dead_boards(directory)
        self._published = -1
        #: Passes at the last look for finished requests, when that was, and when there were none.
        self._passes, self._looked, self._empty_at = -1, -math.inf, time.monotonic()
        self._missing = False
        self._said: set[str] = set()
        self._wake = threading.Event()
        self._stopping = False
        fuse.on_blow = self._wake.set
        self._write_status()
        self._thread = threading.Thread(target=self._run, name="moe-monitor-publisher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic() + self._interval
        while not self._stopping:
            wait = due - time.monotonic()
            if self._requests is not None:
                wait = min(wait, HAND_OVER / 2 if self._requests.pressing else HAND_OVER)
            woken = self._wake.wait(max(0.0, wait))
            self._wake.clear()
            self._fuse.interrupt_hung()
            try:
                finished = self.has_gathered(time.monotonic())
                if woken or finished or time.monotonic() >= due:
                    due = time.monotonic() + self._interval
                    self.publish()  # before the requests: whoever sees them also sees the load that they are part of
                if finished and not self._missing:
                    self.hand_over()
            except Exception as error:
                self._fuse.blow("publish", error)
                self._last_words()
                return

    def has_gathered(self, now: float) -> bool:
        """Whether it is time to :meth:`hand_over`. ``now``: monotonic, seconds."""
        requests, source = self._requests, self._source
        if requests is None or source is None:
            return False
        quiet = False
        if now - self._looked >= 0.75 * HAND_OVER:  # a pass may take longer than this thread sleeps
            passes = source.passes
            quiet, self._passes, self._looked = passes == self._passes, passes, now
        if not requests.pending:
            self._empty_at = now
            return False
        return quiet or requests.pressing or now - self._empty_at >= GATHER

    @property
    def pending(self) -> bool:
        """Whether requests have finished that are not handed over."""
        return self._requests is not None and self._requests.pending

    def publish(self) -> None:
        """One round. Raises what the board or the device copy raise."""
        fresh = not self._board.in_place
        if fresh and not self._make_anew():
            return
        source = self._source
        if source is not None and not self._fuse.blown and source.passes != self._published:
            passes = source.passes  # before the reading: a pass that ends meanwhile is read again next time
            reading = source.read()
            self._board.write("routing", {"rows": reading.rows, "passes": np.array([reading.passes])})
            self._published = passes
            if self._summary is not None:
                self._summary.maybe_log(reading.rows)
        if self._timings is not None and not self._fuse.blown and (self._timings.collect() or fresh):
            self._board.write(SEGMENT, self._timings.table.arrays)
        self._write_status()

    def _make_anew(self) -> bool:
        """After a clean-up of temporary folders, or the end of a login. False where it cannot be done now, as on a
        full disk: nothing stale is shown meanwhile, and what is counted is not lost.
        """
        self._board.close()
        try:
            self._board = self._records.board = self._make_board()
        except BoardError as error:
            if not self._missing:
                self._logger.warning("moe-monitor: its board is gone; nothing is shown until it can be made: %s", error)
            self._missing = True
            return False
        self._logger.warning("moe-monitor: the board %r was removed or damaged, made anew", str(self._board.path))
        self._missing, self._published = False, -1
        return True

    def hand_over(self) -> None:
        """Write what traced requests have finished. Raises what the board or the device copy raise."""
        requests = self._requests
        if requests is not None and requests.pending and not self._fuse.blown:
            self._records.write(requests.drain(self._records.at_once))
            if not self.pending:
                self._empty_at = time.monotonic()

    def _write_status(self) -> None:
        self._board.write("status", {"json": self._fuse.status.to_array()})
        for what in self._fuse.status.dropped.keys() - self._said:
            self._said.add(what)
            if what in DROPPED:
                counted = f"counted in moe_monitor_dropped_total, what={what}, and not said again"
                self._logger.warning("moe-monitor: %s (%s)", DROPPED[what], counted)

    def _last_words(self) -> None:
        try:
            self._write_status()
        except Exception:
            self._board.close()  # no board reads as "not active", a stale one would read as a hanging engine

    def close(self) -> None:
        """Stop the thread and remove the board. Safe to call twice."""
        if self._stopping:
            return
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=2)
        self._board.close()


class Summary:
    """A line in the server's log while tokens are routed, next to vLLM's own stats line."""

    def __init__(
        self,
        identity: Mapping[str, Any],
        interval: float,
        logger: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._layout = RowLayout(identity["experts"])
        self._interval = interval
        self._logger = logger
        self._clock = clock
        self._at = clock()
        self._last: NDArray[np.int64] | None = None

    def maybe_log(self, rows: NDArray[np.int64]) -> None:
        """Log what was routed since the last line, if the interval has passed and anything was."""
        now = self._clock()
        if self._last is None:
            self._last = np.zeros_like(rows)
        if now - self._at < self._interval or not (delta := rows - self._last).any():
            return
        tokens = self._layout.column(delta, "tokens")
        imbalance = statistics.imbalance(self._layout.column(delta, "experts"))
        finite = int((tokens - self._layout.column(delta, "nonfinite")).sum())
        entropy = self._layout.column(delta, "entropy_sum").sum() / FIXED_POINT / finite if finite else float("nan")
        worst = int(np.nanargmax(imbalance))
        floor = statistics.imbalance_floor(int(tokens[worst]), self._identity["experts"], self._identity["top_k"])
        self._logger.info(
            "Engine %03d: MoE routing: %d tokens in %.0f s, most imbalanced layer %d (max/mean %.2f, chance %.2f), "
            "router entropy %.2f of ln(experts)",
            int(self._identity["engine"]),
            int(tokens.max()),
            now - self._at,
            self._identity["layers"][worst],
            imbalance[worst],
            floor,
            entropy,
        )
        self._at, self._last = now, rows.copy()
