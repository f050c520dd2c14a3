"""The hooks of a worker on the serving path: what the seams of the model runners, its graphs and its routers call."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Collection, Hashable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moe_monitor.capture import quick
from moe_monitor.capture.clock import ROUTE_END
from moe_monitor.capture.cuda import CudaMeter
from moe_monitor.capture.fuse import Fuse
from moe_monitor.capture.meter import Meter
from moe_monitor.capture.replays import shorten, watch
from moe_monitor.capture.requests import New, Tracer
from moe_monitor.capture.retained import Retained
from moe_monitor.capture.vllm.context import NotLive, Parallel, graph_key

if TYPE_CHECKING:
    from moe_monitor.capture.vllm.latency import Timing

logger = logging.getLogger("vllm.moe_monitor")


def _extra_args(request: Any) -> Any:
    return None if request.sampling_params is None else request.sampling_params.extra_args


def _new(request: Any) -> New:
    prompt = request.prompt_token_ids
    length = len(request.prompt_embeds) if prompt is None else len(prompt)
    return New(request.req_id, length, request.num_computed_tokens, _extra_args(request))


def _require_complete(complete: bool) -> None:
    if not complete:
        raise NotLive("capture is not live: a pass ended in which not every MoE layer was seen")


class Short(NamedTuple):
    """What the short ways around a pass work with (:mod:`moe_monitor.capture.quick`). ``live``: the traced requests;
    while there are none, a step that brings none needs no :meth:`Hooks.begin_step`, nor anybody whose rows are whose.
    """

    live: Collection[str]
    meter: CudaMeter | quick.Unmetered
    timing: quick.Timing


class Hooks:
    """What they feed, and where the pass in progress stands. The first line of each is the way out."""

    #: This rank's place among those that may see each other's tokens.
    parallel: Parallel

    #: What the model runner last told of its requests' first rows, and the same as what is quicker to look into.
    _told: Any = None
    _starts: memoryview | None = None

    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse
        self.meter: Meter | CudaMeter | None = None
        #: Sampled passes' durations; None where nothing is timed.
        self.timing: Timing | None = None
        #: Which requests are traced; None where none are.
        self.tracer: Tracer | None = None
        #: Whether the model runner is trying itself out with requests that nobody sent.
        self.warming_up = False
        #: Key of the graph under capture, where the model runner knows it and the forward context does not.
        self.capturing: Hashable | None = None
        #: Key of the graph that was replayed in this pass, likewise.
        self.replayed: Hashable | None = None
        #: On so many streams vLLM captures graphs: those of different ones share no memory.
        self.capture_streams = 1
        #: Whether :meth:`note_graph` must be told of the graphs of the pass in progress.
        self.names_graphs = True

    def short(self) -> Short:
        """For the seams of the model runners, once the monitor is attached."""
        meter = self.meter if isinstance(self.meter, CudaMeter) else quick.Unmetered()
        return Short({} if self.tracer is None else self.tracer.live, meter, self.timing or quick.Untimed())

    def watch_replays(self, graph: Any, sealed: Retained) -> None:
        """Of ``graph``, torch's, which counts by itself."""
        assert isinstance(self.meter, CudaMeter)
        watched = watch(graph)
        watched.before = functools.partial(self.before_replay, sealed)
        # the device would look for the next pass where this one was posted
        watched.failed = functools.partial(self.fuse.blow, "record")
        shorten(graph, functools.partial(quick.replaying, self.meter, sealed, self.fuse, watched))

    def observe(self, layer: int, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """A router has decided, on a CPU; called in every pass, real or not."""
        if self.fuse.blown:
            return
        timing = self.timing
        if timing is not None:
            timing.host_point(layer, ROUTE_END)
        if not isinstance(self.meter, Meter) or self.meter.valid == 0:
            return
        with self.fuse.guard("record"):
            if timing is None:
                self.meter.observe(layer, logits, ids)
            else:
                with timing.left_out():
                    self.meter.observe(layer, logits, ids)

    def observe_cuda(self, layer: int, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """A router has decided, on CUDA; called while a graph is captured and in passes without a graph."""
        meter = self.meter
        if self.fuse.blown or not isinstance(meter, CudaMeter):
            return
        if meter.valid:  # no graph is captured in a real pass, and asking takes its time
            if meter.rows_now is None:  # the very first, without a warm-up pass before it: waits for the compiler
                with self.fuse.guard("record"):
                    self._collect(meter, layer, logits, ids)
                return
            start = time.perf_counter()
            try:  # (as in trace_rows)
                self._collect(meter, layer, logits, ids)
            except Exception as error:
                self.fuse.blow("record", error)
            self.fuse.status.hook_seconds += time.perf_counter() - start
            return
        with self.fuse.guard("record", serving=False):
            key = None
            if meter.capturing:
                key = graph_key()
                key = self.capturing if key is None else key
            elif layer == 0:
                graph_key()
            meter.observe(layer, logits, ids, key, self.parallel.span(logits.shape[0]))

    def _collect(self, meter: CudaMeter, layer: int, logits: torch.Tensor, ids: torch.Tensor) -> None:
        if layer == 0:
            graph_key()  # for what it refuses
        meter.collect(layer, logits, ids, self.parallel.span(logits.shape[0]))

    def begin_step(self, scheduled: Any) -> None:
        """The scheduler has decided on a step, with or without a pass; ``scheduled`` is its output."""
        if self.fuse.blown:
            return
        tracer = self.tracer
        if tracer is None:
            return
        try:  # most requests are not traced, and the guard would take longer than to see that
            fresh, finished = scheduled.scheduled_new_reqs, scheduled.finished_req_ids
            preempted, traced = scheduled.preempted_req_ids, []
            if fresh:
                start = time.perf_counter()
                traced = [request for request in fresh if tracer.concerns(request.req_id, _extra_args(request))]
                self.fuse.status.hook_seconds += time.perf_counter() - start
            if not traced:
                some = tracer.live and (preempted or tracer.traces_any(finished) or (fresh and tracer.misses_some()))
                if not some:
                    return
        except Exception as error:
            self.fuse.blow("requests", error)
            return
        with self.fuse.guard("requests"):
            tracer.step([*map(_new, traced)], preempted or (), finished, scheduled.num_scheduled_tokens)

    def trace_rows(
        self, batch: Any, tokens: int | None, scheduled: Any, total: int, computed: str, starts: Any
    ) -> None:
        """Whose the rows of the coming pass are. ``batch`` is the model runner's, of ``tokens`` rows (None: it says so
        itself), ``scheduled`` were tokens by request id, ``total`` in all; ``computed`` names the batch's array of
        first positions, ``starts`` are its requests' first rows, if it tells them, or a buffer of vLLM's that holds
        them. A V1 batch knows its requests' places.
        """
        tracer = self.tracer
        if self.fuse.blown or tracer is None or not tracer.live:
            return
        start = time.perf_counter()
        try:  # nothing in it waits or goes on without end, so it needs no guard, which takes a third as long
            rows = int(batch.num_tokens) if tokens is None else tokens
            index = getattr(batch, "req_id_to_index", None)
            told = getattr(starts, "np", starts)
            if told is not self._told:
                self._told, self._starts = told, None if told is None else memoryview(told)
            positions = getattr(batch, computed)
            tracer.rows(batch.req_ids, rows, scheduled, positions, total=total, index=index, starts=self._starts)
        except Exception as error:
            self.fuse.blow("requests", error)
        self.fuse.status.hook_seconds += time.perf_counter() - start

    def begin_pass(self, tokens: int, scheduled: Mapping[str, int]) -> None:
        """A real pass of ``tokens`` tokens is about to run; ``scheduled`` were so many by request id."""
        timing, meter = self.timing, self.meter
        if self.fuse.blown:
            if timing is not None:
                timing.dummy()
            if isinstance(meter, CudaMeter):
                meter.give_up()
            return
        self.replayed, self.names_graphs = None, True
        if meter is not None:
            with self.fuse.guard("record"):
                meter.begin_pass(tokens)
        if timing is not None:
            timing.scheduled = scheduled
            timing.begin(tokens)
        if isinstance(meter, CudaMeter):
            timed = timing is not None and timing.sampling
            if timed:
                meter.clean, meter.turn = False, -1
            self.names_graphs = timed or not meter.graphs.all_sealed

    def note_graph(self, key: Hashable | None = None) -> None:
        """A graph is about to be replayed or captured; None: the one that the forward context names, in pieces. Need
        not be called unless :attr:`names_graphs`.
        """
        if self.fuse.blown:
            return
        with self.fuse.guard("record"):
            self.replayed = graph_key() if key is None else key
            if isinstance(self.meter, CudaMeter):
                self.meter.clean = False

    def begin_dummy(self) -> None:
        """A warm-up, profiling or idle pass is about to run: nothing in it may be counted."""
        if self.timing is not None:
            self.timing.dummy()
        meter = self.meter
        if self.fuse.blown and isinstance(meter, CudaMeter):
            meter.give_up()
        if self.fuse.blown or meter is None:
            return
        with self.fuse.guard("record", serving=False):
            meter.begin_dummy()

    def end_pass(self, tokens: int) -> None:
        """The real pass has run; ``tokens`` as in :meth:`begin_pass`, or fewer if the model runner dropped some."""
        if self.fuse.blown:
            return
        timing, meter = self.timing, self.meter
        timed = timing is not None and timing.sampling
        if timing is not None and timed:
            timing.stop()
        key: Hashable | None = None
        if isinstance(meter, Meter):
            with self.fuse.guard("record"):
                _require_complete(meter.end_pass())
        else:
            start = time.perf_counter()
            try:  # (as in trace_rows)
                if meter is None or timed or not (meter.counted or meter.pending):
                    key = graph_key() if self.replayed is None else self.replayed
                if meter is not None:
                    _require_complete(meter.end_pass(key, tokens))
            except Exception as error:
                self.fuse.blow("record", error)
            self.fuse.status.hook_seconds += time.perf_counter() - start
        if timing is not None and timed:
            timing.end(key)

    def before_replay(self, graph: Retained) -> None:
        """A graph that counts by itself is about to be replayed."""
        meter = self.meter
        if self.fuse.blown or not isinstance(meter, CudaMeter):
            return
        with self.fuse.guard("record"):
            meter.before_replay(graph)

    def batch_is(self, batch: Any) -> None:
        """The coming pass has this batch's tokens: the model runner has dropped some that were scheduled."""
        meter = self.meter
        if self.fuse.blown or not isinstance(meter, CudaMeter):
            return
        with self.fuse.guard("record"):
            meter.set_valid(int(batch.num_tokens))

    def before_capture(self, config: Any) -> None:
        """vLLM is about to capture CUDA graphs; ``config`` is its compilation config."""
        if self.fuse.blown or not isinstance(self.meter, CudaMeter):
            return
        with self.fuse.guard("record", serving=False):
            self.meter.before_capture(max(config.cudagraph_capture_sizes or (0,)), self.capture_streams)
            self.fuse.status.capture = self.meter.capture
            self.fuse.status.reason = self.meter.fallback
            if self.meter.fallback:
                logger.info(
                    "moe-monitor counts inside the CUDA graphs and traces no requests, because %s", self.meter.fallback
                )
