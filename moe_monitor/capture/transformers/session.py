"""The monitor of a transformers process: ``with moe_monitor.monitor(model) as m: ...``."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from moe_monitor import __version__, settings
from moe_monitor.analysis.records import Record
from moe_monitor.analysis.summary import Summary, summarise
from moe_monitor.capture.fuse import Fuse
from moe_monitor.capture.publisher import Publisher, Reading
from moe_monitor.capture.transformers.attach import Taps
from moe_monitor.capture.transformers.count import SESSIONS, Stream, load_of, rows_of_pass, tables
from moe_monitor.capture.transformers.detect import find_seams
from moe_monitor.capture.transformers.recording import Recorder
from moe_monitor.capture.transformers.spans import Spans
from moe_monitor.capture.transformers.timings import DECODE, PREFILL, Timings
from moe_monitor.capture.transformers.trunk import Group, Trunk, find_trunk
from moe_monitor.latency import EngineLatency
from moe_monitor.layout import RowLayout
from moe_monitor.snapshot import EngineSnapshot

logger = logging.getLogger(__name__)

#: One number for all monitors of a model: it stands in compiled code, where a new one would mean compiling again.
_NUMBERS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_NEXT = itertools.count(1)


class Monitor:
    """Counts the routing of one model in this process. Made by :func:`monitor`; a context manager.

    One forward pass at a time: threads that run the same model at once would mix their passes, as they would mix
    their key-value caches. Counters go on over start and stop; :meth:`reset` empties them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[int] | None,
        latency: bool,
        record: bool,
        record_limit: int,
        skip_token_ids: Iterable[int],
        model_name: str | None,
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self.seams = find_seams(self.model, layers)
        first = self.seams[0]
        self.layers = tuple(seam.layer for seam in self.seams)
        self.layout = RowLayout(first.num_experts)
        self.model_name = model_name or getattr(getattr(model, "config", None), "name_or_path", "") or _name(self.model)
        self.skip = tuple(sorted({int(i) for i in skip_token_ids}))
        self.number = _NUMBERS.setdefault(self.model, next(_NEXT))
        self.in_pass = False
        self._lock = threading.Lock()
        self._fuse = Fuse(logger)
        self._timings: Timings | None = None
        if latency:
            flops = 2 * first.matrices * first.hidden * first.inner
            self._timings = Timings(self.layers, first.num_experts, flops)
        self._clock = None if self._timings is None else self._timings.clock
        self._recorder = Recorder(self.layers, first.scoring, record_limit) if record else None
        self._recording: list[tuple[list[Tensor], list[Tensor]]] = []
        self._taps: Taps | None = None
        self._trunk: Trunk | None = None
        self._publisher: Publisher | None = None
        self._exporter: Any = None
        self._spans: Spans | None = None
        self.groups = self._make_groups()
        self.identity: dict[str, Any] = {
            "version": __version__,
            "producer": "transformers",
            "producer_version": transformers.__version__,
            "server": uuid.uuid4().hex,
            "model_name": self.model_name,
            "engine": "0",
            "rank": {"tp": 0, "pp": 0, "dp": 0},
            "pid": os.getpid(),
            "layers": list(self.layers),
            "experts": first.num_experts,
            "top_k": first.top_k,
            "scoring": first.scoring,
            "hidden_size": first.hidden,
            "intermediate_size": first.inner,
            "matrices": first.matrices,
            "dense_experts": first.dense_now,
            "started": time.time(),
        }

    def _make_groups(self) -> list[Group]:
        by_device: dict[torch.device, list[int]] = {}
        for position, seam in enumerate(self.seams):
            by_device.setdefault(seam.device, []).append(position)
        groups = []
        with torch.inference_mode(mode=False):  # an inference tensor could not be counted into outside inference mode
            for device, positions in by_device.items():
                rows = torch.zeros((len(positions), self.layout.width), dtype=torch.int64, device=device)
                # CUDA graphs only record changes of tensors whose address they may rely on.
                torch._dynamo.mark_static_address(rows)
                tables(self.layout, self.seams[0].top_k, rows.device)
                groups.append(Group(device, positions, rows))
        return groups

    # life cycle

    def start(self) -> Monitor:
        """Attach to the model. Does nothing if attached. Raises RuntimeError if another monitor is."""
        if self._taps is not None:
            return self
        taps = Taps(self.seams, self, self._clock)
        try:
            self._trunk = Trunk(find_trunk(self.model, self.seams), taps, self)
        except BaseException:
            taps.remove()
            raise
        self._taps = taps
        SESSIONS[self.number] = self
        status = self._fuse.status
        status.active, status.capture = not self._fuse.blown, "transformers"
        if not self._fuse.blown:
            status.reason = ""
        if self._spans is not None:
            self._spans.attach(self.model)
        return self

    def stop(self) -> None:
        """Let go of the model, the board and the port; the numbers stay. Safe to call twice."""
        if self._spans is not None:
            self._spans.detach()
        if self._trunk is not None:
            self._trunk.remove()
            self._trunk = None
        if self._taps is not None:
            self._taps.remove()
            self._taps = None
        if not self._fuse.blown:
            self._fuse.status.active, self._fuse.status.reason = False, "stopped"
        if self._exporter is not None:
            self._exporter.stop()
            self._exporter = None
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    def __enter__(self) -> Monitor:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def reset(self) -> None:
        """Forget all that was counted, timed and recorded."""
        with self._lock:
            for group in self.groups:
                group.rows.zero_()
        if self._timings is not None:
            self._timings.reset()
        if self._recorder is not None:
            self._recorder.reset()
        self._recording.clear()

    @property
    def attached(self) -> bool:
        return self._taps is not None

    @property
    def off(self) -> bool:
        """Whether a failure switched counting off; :attr:`reason` says which."""
        return self._fuse.blown

    @property
    def reason(self) -> str:
        return self._fuse.status.reason

    # called by taps and trunk

    @torch.compiler.disable
    def fail(self, where: str, error: BaseException | str) -> None:
        self._fuse.blow(where, error)

    def count(self, rows: Tensor, logits: list[Tensor], ids: list[Tensor], stream: Stream) -> None:
        """Add one pass of one device's layers to its rows; see :func:`count_pass`."""
        if self._fuse.blown or not self.attached:
            return
        with self._fuse.guard("count"):
            if not logits:
                raise RuntimeError("a compiled pass could not be read: unknown mask, or a layer that did not run")
            scoring = self.seams[0].scoring
            fresh = rows_of_pass(logits, ids, stream.real, scoring, self.layout)
            if fresh is not None:
                with self._lock:
                    rows += fresh
            if self._timings is not None and self._timings.wants_load:
                self._note_load(self._timings, rows, ids, fresh if stream.real is None else None)
            if self._recorder is not None:
                self._record(self._recorder, logits, ids, stream)

    def _note_load(self, timings: Timings, rows: Tensor, ids: list[Tensor], counted: Tensor | None) -> None:
        timed = timings.clock.current
        for group in self.groups:
            if timed is not None and group.rows is rows:
                timed.dense = self.seams[0].dense_now
                load = load_of(ids, self.layout.experts) if counted is None else counted[:, : self.layout.experts]
                timed.loads.append((group.positions, load))

    def _record(self, recorder: Recorder, logits: list[Tensor], ids: list[Tensor], stream: Stream) -> None:
        if logits[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("record=True does not work inside CUDA graphs; compile without them, or count only")
        self._recording.append((logits, ids))
        if len(self._recording) < len(self.groups):
            return  # the other devices' layers of this pass come next
        order = np.argsort([p for group in self.groups for p in group.positions])
        all_logits = [x for part, _ in self._recording for x in part]
        all_ids = [x for _, part in self._recording for x in part]
        self._recording.clear()
        recorder.add([all_logits[i] for i in order], [all_ids[i] for i in order], stream)
        self._fuse.status.dropped["recorded_tokens"] = recorder.dropped

    @torch.compiler.disable
    def pass_began(self) -> Any:
        began = None
        with self._fuse.guard("begin"):
            if self._spans is not None:
                began = self._spans.pass_began(self)
            if self._clock is not None:
                self._clock.begin(self.groups[-1].device)
        return began

    @torch.compiler.disable
    def model_ran(self, lengths: int | Tensor, tokens: int) -> None:
        """``lengths``: tokens of every request, or cumulative ones; ``tokens``: all that were computed."""
        with self._fuse.guard("latency"):
            if self._clock is not None:
                kind = lengths if isinstance(lengths, Tensor) else DECODE if lengths == 1 else PREFILL
                self._clock.end(self.groups[-1].device, kind, tokens)

    @torch.compiler.disable
    def pass_ended(self, began: Any, error: BaseException | None) -> None:
        with self._fuse.guard("end"):
            if self._clock is not None:
                self._clock.finish(good=error is None and not self.off)
                if self._clock.dropped:
                    self._fuse.status.dropped["timed_passes"] = self._clock.dropped
            if self._spans is not None and began is not None:
                self._spans.ended(self, began, error)

    # what was seen

    @property
    def passes(self) -> int:
        """For the publisher: always new, because replayed CUDA graphs count without this process knowing."""
        return time.monotonic_ns()

    def rows(self) -> NDArray[np.int64]:
        """A copy of the counter rows, int64 [layers, layout.width]; waits for the device."""
        result = np.zeros((len(self.layers), self.layout.width), dtype=np.int64)
        with self._lock:
            for group in self.groups:
                result[group.positions] = group.rows.cpu().numpy()
        return result

    def read(self) -> Reading:
        """For the publisher: rows and the number of forward passes."""
        rows = self.rows()
        return Reading(rows, int(self.layout.column(rows, "passes").max()))

    def snapshot(self) -> EngineSnapshot:
        """All counters at this moment, as readers of a board see them."""
        reading = self.read()
        return EngineSnapshot(
            server=self.identity["server"],
            model_name=self.model_name,
            engine=self.identity["engine"],
            layers=self.layers,
            layout=self.layout,
            rows=reading.rows,
            passes=reading.passes,
            age=0.0,
            status=self._fuse.status,
            identities=[self.identity],
            latency=self._latency(),
        )

    def _latency(self) -> EngineLatency | None:
        if self._timings is None:
            return None
        if self._publisher is None:  # else the publisher's thread does that
            self._timings.clock.settle(wait=True)
            self._timings.collect()
        return self._timings.snapshot()

    def record(self) -> Record:
        """What was recorded. Raises ValueError without ``record=True`` or before the first token."""
        if self._recorder is None:
            raise ValueError("nothing is recorded; use monitor(model, record=True)")
        return self._recorder.record()

    def summary(self) -> Summary:
        """Everything per layer, see :func:`moe_monitor.analysis.summary.summarise`."""
        recorded = self._recorder is not None and self._recorder.bytes > 0
        return summarise(
            self.snapshot(),
            durations=None if self._clock is None else self._clock.durations(),
            totals=None if self._clock is None else self._clock.totals(),
            record=self.record() if recorded else None,
        )

    def to_frame(self) -> Any:
        """The per-layer summary as a pandas DataFrame. Raises ImportError without pandas."""
        return self.summary().to_frame()

    def print_summary(self) -> None:
        """The per-layer summary as a table on standard output."""
        self.summary().print()

    # to the outside

    def publish(self, directory: Path | None = None) -> None:
        """Write a board, so that ``moe-monitor top`` and ``moe-monitor export`` see this process.

        ``directory``: default ``MOE_MONITOR_DIR``. Does nothing if publishing. Raises BoardError, SettingsError.
        """
        if self._publisher is None:
            knobs = settings.load()
            self._publisher = Publisher(
                knobs.dir if directory is None else directory,
                f"transformers-{os.getpid()}-{self.identity['server'][:8]}",
                self.identity,
                self._fuse,
                self,
                interval=knobs.interval,
                log_interval=0,
                logger=logger,
                timings=self._timings,
            )

    def serve_metrics(self, port: int = 0, host: str = "127.0.0.1", directory: Path | None = None) -> str:
        """Publish, and serve Prometheus metrics of this process; returns the URL. Port 0 takes any free one.

        Raises ExporterError when the port cannot be had, BoardError, SettingsError.
        """
        from moe_monitor.capture.transformers.serving import start_exporter

        if self._exporter is None:
            self.publish(directory)
            where = settings.load().dir if directory is None else directory
            self._exporter = start_exporter(where, self.identity["server"], host, port)
        return f"{self._exporter.url}/metrics"

    def trace(self, tracer_provider: Any = None) -> None:
        """Emit an OpenTelemetry span per ``generate`` call, and per forward pass outside one, from now on.

        ``tracer_provider`` None: the global one. Each span reads the counters, which waits for the device.
        Forward passes inside torch.compile have no spans. Raises ImportError without opentelemetry-api.
        """
        if self._spans is None:
            self._spans = Spans(self, tracer_provider)
            if self.attached:
                self._spans.attach(self.model)

    @contextmanager
    def span(self, name: str, **attributes: str | float | bool) -> Iterator[None]:
        """A span over the block with the routing of all that ran inside it. Needs :meth:`trace`, else RuntimeError."""
        if self._spans is None:
            raise RuntimeError("call trace() first")
        began = self._spans.began(self, name, attributes)
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failure = error
            raise
        finally:
            self._spans.ended(self, began, failure)


def _name(model: nn.Module) -> str:
    return type(model).__name__
