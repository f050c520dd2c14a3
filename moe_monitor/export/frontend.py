"""The front end's half of request tracing: finished requests here, records from the workers there, matched by id.

The engine's front end tells when a request has finished and how long it took; the workers' records tell how it was
routed. Either may come first. A thread brings them together, for metrics and for spans.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_monitor.export.frontboard import FrontBoard
from moe_monitor.export.requests import FleetLoad, Overview, Summary, overviews, summarise
from moe_monitor.gil import Turns
from moe_monitor.records import RecordReader, RequestRecord, short_id

#: Seconds between two looks for records, and while some wait: a ring holds three rounds of the worker's, 0.2 s apart.
POLL, POLL_SOON = 0.4, 0.2
#: While requests are answered records are gathered for so long, in seconds, or until such a share of a ring is full:
#: every round takes Python's lock from the event loop several times, however little there is to do.
GATHER, FULL = 2.0, 0.25
#: How long one half waits for the other, in seconds, and how many may wait, of records also by their size.
FINISHED_WAITS, RECORD_WAITS = 30.0, 10.0
MOST_FINISHED, MOST_RECORDS, RECORD_BYTES = 20_000, 512, 64 << 20


@dataclass
class Finished:
    """A request that the front end has answered; latencies in seconds, NaN where unknown.

    span: its ``llm_request`` span, if there is one. complete: False while its span may still come.
    """

    at: float
    e2e: float = math.nan
    ttft: float = math.nan
    tpot: float = math.nan
    complete: bool = True
    span: Any = None


class FrontEnd:
    """Matches requests with records, in a daemon thread that starts with the first request.

    emit: makes a span of (parent, summary). dropped_spans: how many could not be sent. told: requests that are answered
    are told of by :meth:`finish`. Where nobody tells, every record is of one, of unknown latency; then :meth:`start`.
    """

    def __init__(
        self, directory: Path, server: str, fleet: FleetLoad, logger: logging.Logger, *, told: bool = True
    ) -> None:
        self._told = told
        self._pause = Turns()
        self._reader = RecordReader(directory, server, pause=self._pause)
        self._board = FrontBoard(directory, server)
        self._fleet = fleet
        self._logger = logger
        self._lock = threading.Lock()
        self._finished: dict[str, Finished] = {}
        self._records: dict[str, tuple[float, RequestRecord]] = {}
        #: Requests that were answered, by now and at the last look; when records were last matched.
        self._answered = self._looked_at = 0
        self._matched_at = -math.inf
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self.emit: Callable[[Any, Summary], None] | None = None
        self.dropped_spans: Callable[[], int] = lambda: 0
        self.failed = False

    def fail(self, where: str, error: BaseException) -> None:
        """Give up, say so once, and let serving go on."""
        if not self.failed:
            self.failed = True
            self._logger.warning("moe-monitor traces no requests any more, %s failed: %r", where, error)

    # the thread that answers requests

    def finish(self, request_id: str, finished: Finished) -> None:
        """A request has been answered."""
        self._answered += 1
        with self._lock:
            self._finished[short_id(request_id)] = finished
            if len(self._finished) > MOST_FINISHED:
                del self._finished[next(iter(self._finished))]
        if self._thread is None:
            self.start()

    def start(self) -> None:
        """Start the thread."""
        thread = threading.Thread(target=self._run, name="moe-monitor-requests", daemon=True)
        thread.start()
        self._thread = thread

    def notice(self, request_id: str, span: Any) -> None:
        """The ``llm_request`` span of a request has ended."""
        with self._lock:
            found = self._finished.get(short_id(request_id))
            if found is not None:
                found.span = span

    def complete(self, request_id: str) -> None:
        """The span of a request has come, if it ever will."""
        with self._lock:
            found = self._finished.get(short_id(request_id))
            if found is not None:
                found.complete = True

    # the thread that matches

    def _run(self) -> None:
        wait = POLL
        while not self._stop.wait(wait) and not self.failed:
            try:
                wait = self.look(time.monotonic())
            except Exception as error:
                self.fail("matching", error)
        if not self.failed:
            with contextlib.suppress(Exception):
                self.match()  # what was gathered
        self._board.close()

    def look(self, now: float) -> float:
        """:meth:`match` if it is time to; seconds until the next look."""
        quiet, self._looked_at = self._answered == self._looked_at, self._answered
        waiting = 0.0 if quiet else self._reader.waiting()
        if quiet or waiting >= FULL or now - self._matched_at >= GATHER:
            self._matched_at = now
            self.match(now)
        return POLL_SOON if waiting else POLL

    def match(self, now: float | None = None) -> None:
        """One round. Raises what reading, the board or OpenTelemetry raise."""
        now = time.monotonic() if now is None else now
        for record in self._reader.poll():
            self._records[record.meta.id] = (now, record)
        pairs = []
        with self._lock:
            for name, (since, record) in list(self._records.items()):
                finished = self._finished.get(name) if self._told else Finished(now)
                if finished is not None and finished.complete:
                    pairs.append((finished, record))
                    self._finished.pop(name, None)
                if (finished is not None and finished.complete) or now - since > RECORD_WAITS:
                    del self._records[name]  # unmatched: aborted, or answered by another API server
            room = MOST_RECORDS
            if self._records:
                _, record = next(iter(self._records.values()))
                room = min(room, max(64, RECORD_BYTES // record.counts.nbytes))
            while len(self._records) > room:
                del self._records[next(iter(self._records))]
            while self._finished and now - next(iter(self._finished.values())).at > FINISHED_WAITS:
                del self._finished[next(iter(self._finished))]  # not traced
        told = overviews([record for _, record in pairs], self._fleet.of, self._pause)
        for (finished, record), overview in zip(pairs, told, strict=True):
            self._tell(finished, record, overview)
            self._pause()
        lost = {"spans": self.dropped_spans(), "request_records": self._reader.missed}
        if pairs or lost != self._board.dropped:
            self._board.dropped = lost
            self._board.publish()

    def _tell(self, finished: Finished, record: RequestRecord, overview: Overview) -> None:
        values = overview._asdict() | {"e2e": finished.e2e, "ttft": finished.ttft, "tpot": finished.tpot}
        span = finished.span
        self._board.add((record.model_name, record.engine), values, "" if span is None else span.trace_id)
        if span is not None and self.emit is not None:
            self.emit(span, summarise(record, self._fleet.of(record)))

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2)
