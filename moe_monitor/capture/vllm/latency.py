"""Seam: where the time is taken in a vLLM model, and the twins of its CUDA graphs.

On CUDA the MoE layer is one opaque op to the compiler, so the live layer's ``_forward_impl`` (the op's body) and its
``gate``, where it holds one, are wrapped in plain Python. A gate outside of the layer is compiled code: its kernels are
found in the captured graph, and in passes without a graph it is run once more, timed. On CPUs the compiler traces
through everything, and the time is taken by an op at the block that holds gate and layer.

The wrappers on CUDA are put on for passes that are timed and while graphs are captured, and are off in all others: in a
pass without a graph even a call that does nothing takes its time, once a layer.

Whatever fails here switches timing off, and nothing else.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from moe_monitor.capture.clock import ENTER, GATE_BEGIN, GATE_END, LEAVE, ROUTE_BEGIN, HostClock, Work, kind_of
from moe_monitor.capture.device_clock import DeviceClock
from moe_monitor.capture.driver import Driver
from moe_monitor.capture.fuse import Guard
from moe_monitor.capture.quick import NEVER
from moe_monitor.capture.vllm import op
from moe_monitor.latency import LatencyTable

if TYPE_CHECKING:
    from moe_monitor.capture.vllm.attach import Capture
    from moe_monitor.capture.vllm.layers import RouterFacts

logger = logging.getLogger("vllm.moe_monitor")

Wrap = Callable[[Any, str, Callable[..., Any]], None]


def work_of(runner: Any, facts: RouterFacts, placement: Mapping[str, Any] | None) -> Work:
    """What expert GEMMs cost on this rank: a whole expert under expert parallelism, else a tensor-parallel slice."""
    parallel = runner.moe_config.moe_parallel_config
    flops = 2 * facts.matrices * facts.hidden_size * facts.intermediate_size
    if parallel.use_ep:
        known = placement is not None and int(runner.moe_config.dp_size) == 1
        return Work(flops, None if placement is None else placement["experts"], known)
    return Work(flops // int(runner.moe_config.tp_size), None, int(runner.moe_config.dp_size) == 1)


class Timing:
    """The clock of one worker under its own fuse. ``clock`` is None once something failed."""

    def __init__(self, capture: Capture, layers: list[tuple[int, Any]], every: int, work: Work, experts: int) -> None:
        self.clock: HostClock | DeviceClock | None = None
        self._capture = capture
        self._status = capture.fuse.status
        self.table = LatencyTable(len(layers))
        #: A decode step gives a request at most so many tokens: its own, and drafts.
        self.decode_tokens = 1
        #: Tokens by request of the step to come.
        self.scheduled: Mapping[str, int] = {}
        #: Passes that have begun, and the next one that the clock is asked about.
        self.passes = self.soonest = 0
        self._refusals = 0
        self._every, self._work, self._experts, self._count = every, work, experts, len(layers)
        #: What a pass that is timed puts wrappers on: (object, name, what makes the wrapper of what is there).
        self._wrapped: list[tuple[Any, str, Callable[[Any], Any]]] = []
        #: Those that are on: (the object's attributes, name, ours, its own or None).
        self._on: list[tuple[dict[str, Any], str, Any, Any]] = []

    def guard(self, *, serving: bool = True) -> Guard:
        """Run a part of timing: what it raises switches timing off instead of reaching the caller."""
        return self._capture.fuse.guard("latency", serving=serving, on_error=self.fail)

    def fail(self, error: Exception) -> None:
        """Switch timing off for good, and say so once."""
        clock, self.clock = self.clock, None
        self.soonest = NEVER
        self.arm(False)
        self._capture.fuse.count_error("latency")
        logger.warning("moe-monitor times no layers any more; everything else goes on. Cause: %r", error)
        if isinstance(clock, DeviceClock):
            clock.capturing = False
            try:
                clock.close()
            except Exception as second:
                logger.warning("moe-monitor: %r", second)

    # attaching

    def attach_cuda(self, layers: list[tuple[int, Any]], parents: list[Any], device: Any, width: int) -> None:
        """Make wrappers for the live layers of a model on a CUDA device."""
        with self.guard(serving=False):
            self.clock = clock = DeviceClock(
                self._count, self._every, self._work, self._experts, width=width, device=device, driver=Driver()
            )
            self.table = clock.table
            for position, (_, runner) in enumerate(layers):
                outside = getattr(parents[position], "gate", None) if runner.gate is None else None
                self._wrapped.append((runner, "_forward_impl", functools.partial(self._layer, position, outside)))
                if runner.gate is not None:
                    self._wrapped.append((runner.gate, "forward", functools.partial(self._gate, position)))

    def arm(self, on: bool) -> None:
        """Put the wrappers of a CUDA model on its layers and gates, or take them off where nobody has put others on
        since.
        """
        if on and not self._on:
            for target, name, make in self._wrapped:
                attributes = target.__dict__  # a module's own way to set one takes long
                wrapper = make(getattr(target, name))
                self._on.append((attributes, name, wrapper, attributes.get(name)))
                attributes[name] = wrapper
        while not on:
            try:
                attributes, name, wrapper, own = self._on.pop()
            except IndexError:  # the publisher's thread may do the same at the same time
                return
            if attributes.get(name) is wrapper:
                attributes[name] = own
                if own is None:
                    del attributes[name]

    def _layer(self, position: int, gate: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward_impl(hidden_states: Any, router_logits: Any, *args: Any, **kwargs: Any) -> Any:
            clock = self.noting
            if clock is None:
                return original(hidden_states, router_logits, *args, **kwargs)
            with self.guard(serving=clock.sampling):
                if clock.sampling and gate is not None and hidden_states.shape[-1] == gate.weight.shape[-1]:
                    clock.point(position, GATE_BEGIN)
                    gate(hidden_states)
                    clock.point(position, GATE_END)
                clock.enter(position, None if gate is None else router_logits)
            result = original(hidden_states, router_logits, *args, **kwargs)
            self.point(position, LEAVE)
            return result

        return forward_impl

    def _gate(self, position: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.point(position, GATE_BEGIN)
            result = original(*args, **kwargs)
            self.point(position, GATE_END)
            return result

        return forward

    def attach_cpu(self, layers: list[tuple[int, Any]], parents: list[Any], wrap: Wrap) -> None:
        """Put ops that take the time at the blocks of a model on a CPU."""
        with self.guard(serving=False):
            self.clock = HostClock(self._count, self._every, self._work, self._experts)
            self.table = self.clock.table
            for position, (_, runner) in enumerate(layers):
                wrap(parents[position], "forward", _block(position, parents[position]))
                if runner.shared_experts is not None:  # they run before the choice, and are no part of the gate
                    wrap(runner, "_apply_quant_method", _after_gate(position, runner._apply_quant_method))
            op.set_clock(self.host_point)

    # the step

    def begin(self, tokens: int) -> None:
        """A real pass of ``tokens`` tokens is about to run."""
        clock = self.clock
        if clock is None:
            return
        self.passes = passes = self.passes + 1
        if passes < self.soonest:
            return
        with self.guard():
            clock.begin(passes, tokens, lambda: kind_of(self.scheduled, self.decode_tokens), self._rows())
            self.soonest = passes + 1 if clock.sampling else clock.soonest
            self.arm(clock.sampling)
        if self.clock is None:  # switched off meanwhile
            self.soonest = NEVER
            self.arm(False)

    @property
    def sampling(self) -> bool:
        """Whether the pass in progress is timed."""
        clock = self.clock  # the publisher's thread may switch timing off at any time
        return clock is not None and clock.sampling

    def stop(self) -> None:
        """The pass has run; the monitor's own work comes next."""
        clock = self.clock
        if clock is not None and clock.sampling:
            with self.guard():
                clock.stop()

    def end(self, key: Any) -> None:
        """The monitor has counted the pass, which replayed the graph ``key`` (None: no graph)."""
        clock = self.clock
        if clock is None or not clock.sampling:
            return
        self.arm(False)
        with self.guard():
            if isinstance(clock, DeviceClock):
                clock.end(key, self._rows())
            else:
                clock.end(self._rows())

    def dummy(self) -> None:
        """A pass that is none of the server's work is about to run."""
        clock = self.clock
        if clock is not None and clock.sampling:
            self.arm(False)
            with self.guard(serving=False):
                clock.cancel()

    def _rows(self) -> Any:
        meter = self._capture.meter
        return None if meter is None else meter.rows_now

    @property
    def noting(self) -> DeviceClock | None:
        """The clock, while :meth:`point` does anything."""
        clock = self.clock
        return clock if isinstance(clock, DeviceClock) and (clock.sampling or clock.capturing) else None

    def point(self, layer: int, point: int) -> None:
        """Take the time, or note the place while a graph is captured."""
        clock = self.noting
        if clock is None:
            return
        with self.guard(serving=clock.sampling):
            clock.point(layer, point)

    def host_point(self, layer: int, point: int) -> None:
        """Take the time on a CPU, from compiled code; called in every pass."""
        clock = self.clock
        if not isinstance(clock, HostClock) or not clock.sampling:
            return
        with self.guard():
            if point == ENTER or (point == ROUTE_BEGIN and not clock.has(layer, ENTER)):
                clock.point(layer, GATE_END)
                clock.point(layer, ENTER)
            clock.point(layer, point)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """The monitor's own work within a layer, on a CPU: no part of any stage."""
        clock = self.clock
        if not isinstance(clock, HostClock) or not clock.sampling:
            yield
            return
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            clock.leave_out(time.perf_counter_ns() - start)

    # graphs

    def _capturing(self) -> DeviceClock | None:
        return self.clock if isinstance(self.clock, DeviceClock) and self.clock.capturing else None

    def before_graphs(self) -> None:
        """vLLM is about to capture its graphs."""
        if isinstance(self.clock, DeviceClock):
            with self.guard(serving=False):
                self.clock.before_capture()
                self.arm(True)

    def note_end(self, key: Any) -> None:
        """The model's part of the graph ``key``, or of a piece of it, is captured."""
        clock = self._capturing()
        if clock is not None and key[0] == "FULL":
            with self.guard(serving=False):
                clock.note_end()

    def lay_twin_aside(self, graph: Any, key: Any) -> None:
        """The capture into ``graph`` is about to end."""
        clock = self._capturing()
        if clock is None:
            return
        with self.guard(serving=False):
            whole = key[0] == "FULL"
            if whole or _power_of_two(key[1].num_tokens):
                clock.end_of_graph(graph, key, whole=whole)

    def after_graphs(self) -> None:
        """vLLM has captured its graphs."""
        self.arm(False)
        if isinstance(self.clock, DeviceClock):
            self.clock.after_capture()

    # what the publisher asks for

    def collect(self) -> bool:
        clock = self.clock
        if clock is None:
            return False
        try:
            if clock.dropped:
                self._status.dropped["latency_samples"] = clock.dropped
            found = clock.collect()
            if isinstance(clock, DeviceClock):
                self._tell_of_refusals(clock)
            return found
        except Exception as error:
            self.fail(error)
            return False

    def _tell_of_refusals(self, clock: DeviceClock) -> None:
        new = clock.refusals[self._refusals :]
        for _ in new:
            self._capture.fuse.count_error("latency")
        if new and not self._refusals:
            logger.warning(
                "moe-monitor cannot time a CUDA graph layer by layer, only as a whole, like any further ones that are "
                "counted in moe_monitor_errors_total{where=latency}. Cause: %s",
                new[0],
            )
        self._refusals = len(clock.refusals)


def _power_of_two(n: int) -> bool:
    """Of graphs in many pieces only those of such sizes get twins: a copy of each takes time at start-up."""
    return n & (n - 1) == 0


def _block(position: int, block: Any) -> Callable[..., Any]:
    original = block.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.ops.moe_monitor.mark(hidden_states, position, GATE_BEGIN)
        result = original(hidden_states, *args, **kwargs)
        if isinstance(result, torch.Tensor):
            torch.ops.moe_monitor.mark(result, position, LEAVE)
        return result

    return forward


def _after_gate(position: int, original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.ops.moe_monitor.mark(router_logits, position, ENTER)
        return original(hidden_states, router_logits, *args, **kwargs)

    return apply
