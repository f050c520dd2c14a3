"""The collector: boards in, metric families out. The same one serves vLLM's /metrics and the stand-alone exporter.

``MoeCollector`` is also a ``prometheus_client`` collector, for registries that take one. ``collect()`` never raises:
a raising collector would take every other metric of its registry down with it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as ClientMetric
from prometheus_client.registry import Collector

from moe_monitor.board import BoardError
from moe_monitor.catalog import BY_NAME
from moe_monitor.export.exposition import Exposition
from moe_monitor.export.families import Family, expert_parallel, families
from moe_monitor.export.frontboard import read_front_boards, request_families
from moe_monitor.export.windows import RESOLUTION, History
from moe_monitor.gil import let_others
from moe_monitor.snapshot import EngineSnapshot, read_engines

logger = logging.getLogger(__name__)


class MoeCollector(Collector):
    """Reads the boards of a run directory at every call.

    server: only this server's boards; None for all on this machine. max_series: see :func:`families`.
    identity: (model_name, engine) pairs that must always show ``moe_monitor_active``, 0 when no board is there.
    gentle: let go of Python's lock every few hundred microseconds, for the sake of an event loop that shares it.
    from_start: whether windows begin with the engines rather than with this reader; by default those of one server do.
    """

    def __init__(
        self,
        directory: Path,
        *,
        server: str | None = None,
        max_series: int | None = None,
        identity: tuple[tuple[str, str], ...] = (),
        from_start: bool | None = None,
        gentle: bool = False,
        logger: logging.Logger = logger,
    ) -> None:
        self.directory = directory
        self.server = server
        self.max_series = max_series
        self.expected = identity
        self._logger = logger
        self._history = History(from_start=server is not None if from_start is None else from_start)
        self._lock = threading.Lock()
        #: What is read first must be remembered first: a history that goes back starts anew.
        self._reading = threading.Lock()
        self._pause = let_others if gentle else _go_on
        self._exposition = Exposition(self._pause)
        self._read_errors = 0
        self._warned = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def history(self) -> History:
        """Recent rows of every engine, as the trailing windows need them."""
        return self._history

    def start(self) -> None:
        """Feed the trailing windows from a daemon thread, so that they do not depend on when scrapes come."""
        if self._thread is None:
            thread = threading.Thread(target=self._feed, name="moe-monitor-windows", daemon=True)
            thread.start()
            self._thread = thread

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _feed(self) -> None:
        while not self._stop.wait(RESOLUTION):
            self.read()

    def read(self) -> list[EngineSnapshot]:
        """Current snapshots; never raises. What could not be read is counted and said once in the log."""
        with self._reading:
            try:
                engines = read_engines(self.directory, self.server, self._failed, self._pause)
            except Exception as error:
                if not isinstance(error, BoardError) or self.directory.exists():
                    self._failed(error)
                engines = []
            self._pause()
            self._history.add(engines)
        self._pause()
        return engines

    def _failed(self, error: Exception) -> None:
        self._read_errors += 1
        if str(error) != self._warned:
            self._warned = str(error)
            self._logger.warning("moe-monitor: %s", error)

    def families(self) -> list[Family]:
        """All families of all engines; never raises, an engine that fails is left out and counted."""
        result: list[Family] = []
        seen = set()
        together: dict[tuple[str, str], list[EngineSnapshot]] = {}
        for engine in self.read():
            together.setdefault(engine.key[:2], []).append(engine)
            try:
                for family in self._named(engine.server, families(engine, self._history, self.max_series)):
                    result.append(family)
                    self._pause()
                seen.add((engine.model_name, engine.engine))
            except Exception as error:
                self._failed(error)
        for engines in together.values():
            try:
                result += self._named(engines[0].server, expert_parallel(engines, self._history))
            except Exception as error:
                self._failed(error)
        try:
            for key, (arrays, dropped) in read_front_boards(self.directory, self.server).items():
                result += self._named(key[0], request_families(key, arrays, dropped))
        except Exception as error:
            if not isinstance(error, BoardError) or self.directory.exists():
                self._failed(error)
        for pair in self.expected:
            if pair not in seen:
                result.append(Family(BY_NAME["moe_monitor_active"], pair, [()], [0]))
        if self._read_errors:
            pair = self.expected[0] if self.expected else ("", "")
            result.append(Family(BY_NAME["moe_monitor_errors_total"], pair, [("collect",)], [self._read_errors]))
        return result

    def _named(self, server: str, made: Iterable[Family]) -> Iterable[Family]:
        """A collector of all servers of a machine must tell them apart: they may serve the same model."""
        return made if self.server is not None else (replace(family, server=server) for family in made)

    def render(self, *, openmetrics: bool = False, names: Sequence[str] | None = None) -> bytes:
        """The exposition, of all metrics or of those named; never raises."""
        try:
            families = self.families()
            if names is not None:
                families = [f for f in families if f.metric.name in names]
            with self._lock:
                return self._exposition.render(families, openmetrics=openmetrics)
        except Exception as error:
            self._failed(error)
            return b"# EOF\n" if openmetrics else b""

    def stream(self, *, openmetrics: bool = False) -> Iterator[bytes]:
        """The exposition of all metrics piece by piece, to be read to its end without delay: others wait meanwhile.
        Raises what writing a family raises, since what was sent cannot be taken back.
        """
        families = self.families()
        with self._lock:
            try:
                yield from self._exposition.parts(families, openmetrics=openmetrics)
            except Exception as error:
                self._failed(error)
                raise

    def collect(self) -> Iterator[ClientMetric]:
        """prometheus_client's interface; never raises."""
        try:
            grouped: dict[str, ClientMetric] = {}
            for family in self.families():
                _add(grouped, family)
            ready = list(grouped.values())
        except Exception as error:
            self._failed(error)
            return
        yield from ready

    def describe(self) -> list[ClientMetric]:
        """Nothing: registering must not read boards that do not exist yet."""
        return []


def _go_on() -> None:
    pass


def _add(grouped: dict[str, ClientMetric], family: Family) -> None:
    metric, names = family.metric, family.names
    kinds = {"counter": CounterMetricFamily, "histogram": HistogramMetricFamily}
    if metric.name not in grouped:
        made = kinds.get(metric.kind, GaugeMetricFamily)(metric.name, metric.help, labels=names)
        grouped[metric.name] = made
    client = grouped[metric.name]
    if isinstance(client, HistogramMetricFamily):
        bounds = [repr(float(b)) for b in metric.buckets] + ["+Inf"]
        cumulative = np.cumsum(np.asarray(family.values), axis=-1).tolist()
        for labels, row, total in zip(family.labels, cumulative, np.asarray(family.sums).tolist(), strict=True):
            client.add_metric(family.common + labels, list(zip(bounds, row, strict=True)), total)
    elif isinstance(client, CounterMetricFamily | GaugeMetricFamily):
        for labels, value in zip(family.labels, family.values, strict=True):
            client.add_metric(family.common + labels, float(value))
