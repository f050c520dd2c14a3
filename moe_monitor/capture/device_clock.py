"""The clock of CUDA devices: stamps of the GPU's own ``%globaltimer``, also within CUDA graphs.

A sampled pass without a graph launches the stamping kernel between the model's own (:meth:`DeviceClock.point`). While
graphs are captured, the same calls only note where in the graph they stand; when a capture ends, an instrumented twin
of the graph is laid aside (:mod:`moe_monitor.capture.stamps`). The first sampled pass that meets a graph has its twin
made ready, by the publisher's thread; later ones launch the twin in the graph's stead. Graphs that are met often are
met first, so the bounded number of twins goes to them. A graph without a twin is timed as a whole.

Nothing here waits for the device: stamps are copied to pinned memory behind the pass, and read when they have arrived.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_monitor.capture.clock import ENTER, GATE_BEGIN, GATE_END, POINTS, Sampler, Work, stages_of
from moe_monitor.capture.driver import Driver, DriverError
from moe_monitor.capture.replays import watch
from moe_monitor.capture.stamps import Mark, Marks, Stamper, Twin
from moe_monitor.latency import LatencyTable, SampledStep

#: Slots before those of the layers: begin and end of a pass on the stream; two stamps in a row where a graph begins,
#: which tell what a stamp takes, and its end.
_BEGIN, _END, _GRAPH_FIRST, _GRAPH_BEGIN, _GRAPH_END = range(5)
_LAYERS = 5
#: A stamp adds this much less between kernels of the model than after another stamp, where the GPU has nothing to run
#: while it prepares the next kernel. On an H100 a pass with 99 stamps took 0.78 to 0.81 us longer for each of them,
#: where two in a row were 0.86 to 0.93 us apart (benchmarks/results/h100_latency.md).
_BETWEEN = 0.88
#: Sampled passes on their way to the host.
_RING = 8
#: Whoever lets go of all twins waits at most so long for the one that is being made ready, in seconds.
_LET_GO = 1.0
#: No more twins are made ready once they have so many nodes. One takes about 3.8 KB of device memory (H100).
_MOST_NODES = 2_200
#: Device memory that twins may take, MiB.
TWINS_MIB = 10
#: Names of kernels that compute router logits. A split reduction has two.
_GATE = re.compile(r"gemm|gemv|split_?k|nvjet|cutlass|xmma|triton_tem", re.IGNORECASE)
_LONGEST_GATE = 4


@dataclass
class _Group:
    """The twins of all pieces of one captured pass; ``whole`` when one graph holds all of it."""

    whole: bool
    nodes: int = 0
    twins: list[Twin] = field(default_factory=list)
    #: A sampled pass has met it: its twins are to be made ready, or were, or cannot be.
    asked: bool = False
    ready: bool = False
    refused: bool = False


@dataclass
class _Flight:
    """A sampled pass whose stamps are on their way to slot ``at`` of the ring."""

    at: int
    number: int
    kind: int
    tokens: int
    counted: bool
    in_graph: bool
    arrived: Any


class DeviceClock:
    """Times sampled passes of ``layers`` MoE layers on one device. See :class:`~moe_monitor.capture.clock.HostClock`.

    ``device``, ``layers``, ``work``, ``experts`` as there. ``width``: columns of the counter rows, 0 where this rank
    has none. Raises DriverError where the CUDA driver does not offer what is needed.
    """

    name = "globaltimer"

    @torch.inference_mode(False)
    def __init__(
        self, layers: int, every: int, work: Work, experts: int, *, width: int, device: torch.device, driver: Driver
    ) -> None:
        self.table = LatencyTable(layers)
        self.sampling = False
        #: Whether graphs are being captured whose twins are wanted.
        self.capturing = False
        self.dropped = 0
        #: Why graphs got no twin, and what is in them.
        self.refusals: list[str] = []
        self._layers, self._work, self._experts, self._device = layers, work, experts, device
        self._sampler = Sampler(every)
        self._driver = driver
        slots = _LAYERS + layers * POINTS
        self._slots = torch.zeros(slots, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._host = torch.zeros((_RING, slots), dtype=torch.int64, pin_memory=pinned)
        self._rows = torch.zeros((_RING, 2, layers, max(1, width)), dtype=torch.int64, pin_memory=pinned)
        self._host_numpy, self._rows_numpy = self._host.numpy(), self._rows.numpy()
        self._stamper = Stamper(driver, self._slots.data_ptr())
        self._marks: Marks | None = None
        self._groups: dict[Hashable, _Group] = {}
        self._nodes = 0
        self._overhead = 0
        self._lock = threading.Lock()
        #: Held while twins are made ready or let go of, which takes milliseconds.
        self._making = threading.Lock()
        self._free = deque(range(_RING))
        self._flights: deque[_Flight] = deque()
        self._wanted: deque[_Group] = deque()
        self._now = _Flight(0, 0, 0, 0, False, False, None)

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def _record(self) -> Any:
        """An event behind all that was queued so far."""
        return torch.cuda.current_stream(self._device).record_event()

    def _make_current(self) -> None:
        """Make the device's context current on this thread, which the driver's functions need."""
        with torch.cuda.device(self._device):
            torch.cuda.mem_get_info(self._device)

    def _slot(self, layer: int, point: int) -> int:
        return _LAYERS + layer * POINTS + point

    # the pass

    @property
    def soonest(self) -> int:
        """Unless a pass is being timed, :meth:`begin` has nothing to do before the one with this number."""
        return self._sampler.next

    def begin(self, number: int, tokens: int, kind: Callable[[], int], rows: Tensor | None) -> None:
        """A real pass is about to run; ``rows`` are the counter rows on the device."""
        self.sampling = False
        if not self._sampler.hit(number):
            return
        try:
            at = self._free.popleft()
        except IndexError:  # the device is more than a ring of samples behind
            self.dropped += 1
            return
        self._now = _Flight(at, number, kind(), tokens, rows is not None, False, None)
        self._slots.zero_()
        if rows is not None:
            self._rows[at, 0].copy_(rows, non_blocking=True)
        self._stamper.stamp(_BEGIN, self._stream())
        self.sampling = True

    def stop(self) -> None:
        """The pass has run."""
        self._stamper.stamp(_END, self._stream())

    def end(self, key: Hashable | None, rows: Tensor | None) -> None:
        """The pass was counted; it ran with the graph ``key`` (None: without one); ``rows`` will include it."""
        if not self.sampling:
            return
        self.sampling = False
        now = self._now
        self._host[now.at].copy_(self._slots, non_blocking=True)
        if rows is not None and now.counted:
            self._rows[now.at, 1].copy_(rows, non_blocking=True)
        now.arrived = self._record()
        with self._lock:
            self._flights.append(now)
            group = self._groups.get(key) if key is not None else None
            if group is not None and not group.asked:  # once: it may be being made ready at this moment
                group.asked = True
                self._wanted.append(group)

    def cancel(self) -> None:
        """The pass in progress is none that counts."""
        if self.sampling:
            self.sampling = False
            self._free.append(self._now.at)

    def point(self, layer: int, point: int) -> None:
        """Here, on the current stream: a stamp in a sampled pass, a mark while a graph is captured."""
        if self.sampling:
            self._stamper.stamp(self._slot(layer, point), self._stream())
        elif self.capturing:
            marks, tail = self._here()
            if marks is not None:
                marks.note(self._driver, self._slot(layer, point), tail)

    def enter(self, layer: int, logits: Tensor | None) -> None:
        """While a graph is captured: the layer begins, and the ``logits`` that it was given are the gate's work.

        The gate's kernels are found in the graph: the last ones before the layer, if they are what a gate is made of.
        """
        if self.capturing:
            marks, tail = self._here()
            if marks is None:
                return
            first = self._first_of_gate(tail, logits.data_ptr()) if logits is not None else None
            if first is not None:
                before = tuple(edge.node for edge in self._driver.dependencies(first))
                others = frozenset(
                    (a, edge.node) for a in before for edge in self._driver.dependents(a) if edge.node != first
                )
                marks.marks.append(Mark(self._slot(layer, GATE_BEGIN), before, others))
                marks.note(self._driver, self._slot(layer, GATE_END), tail)
        self.point(layer, ENTER)

    def _first_of_gate(self, tail: tuple[int, ...], address: int) -> int | None:
        """The first of the kernels that end in ``tail`` and compute what lies at ``address``; None if unclear.

        The last one is known by its name or by the address among its arguments; kernels that use the tensor memory
        accelerator have the address in a descriptor instead.
        """
        driver = self._driver
        if len(tail) != 1 or not driver.is_kernel(tail[0]):
            return None
        node, first = tail[0], None
        for _ in range(_LONGEST_GATE):
            if not driver.is_kernel(node):
                break
            named = _GATE.search(driver.kernel_name(node)) is not None
            if not named and (first is not None or address.to_bytes(8, "little") not in driver.kernel_arguments(node)):
                break
            first = node
            before = driver.dependencies(node)
            if not named or len(before) != 1:
                break
            node = before[0].node
        return first

    def _here(self) -> tuple[Marks | None, tuple[int, ...]]:
        """The marks of the graph that the current stream is captured into, and where in it the stream stands."""
        state = self._driver.capture_state(self._stream())
        if state is None:
            return None, ()
        if self._marks is None or self._marks.graph != state.graph:
            self._marks = Marks(state.graph)
        return self._marks, state.tail

    # graphs

    def before_capture(self) -> None:
        """Graphs are about to be captured, anew or for the first time."""
        self.close()
        self.capturing = True

    def after_capture(self) -> None:
        self.capturing = False
        self._marks = None

    def note_end(self) -> None:
        """The model's own part of a graph that is a whole pass ends here."""
        marks, tail = self._here()
        if marks is not None and marks.marks:
            marks.note(self._driver, _GRAPH_END, tail)

    def end_of_graph(self, graph: Any, key: Hashable, *, whole: bool) -> None:
        """The capture into ``graph`` (a ``torch.cuda.CUDAGraph``) is about to end. ``whole``: it is the whole pass,
        and its end was noted.
        """
        marks, _ = self._here()
        self._marks = None
        if marks is None or not marks.marks:
            return
        twin = Twin(self._stamper, marks.graph, marks.marks)
        group = self._groups.setdefault(key, _Group(whole))
        group.twins.append(twin)
        twin.prepare((_GRAPH_FIRST, _GRAPH_BEGIN))
        group.nodes += twin.nodes
        self._stand_in(graph, group, twin)

    def _stand_in(self, graph: Any, group: _Group, twin: Twin) -> None:
        """Let the graph's ``replay`` launch its twin in sampled passes."""
        watch(graph).instead = lambda: self.sampling and group.ready and self._launch(group, twin)

    def _launch(self, group: _Group, twin: Twin) -> bool:
        """Whether the twin was launched; a twin that cannot be is not tried again."""
        try:
            twin.launch(self._stream())
        except Exception:
            group.ready, group.refused = False, True
            return False
        self._now.in_graph |= group.whole
        return True

    # on the publisher's thread

    def collect(self) -> bool:
        """Move what has arrived into the table, and make twins ready that passes have asked for."""
        self._make_ready()
        found = False
        while self._flights and self._flights[0].arrived.query():
            with self._lock:
                flight = self._flights.popleft()
            self.table.add(self._step(flight))
            self._free.append(flight.at)
            found = True
        return found

    def _make_ready(self) -> None:
        while self._wanted:
            with self._lock:
                group = self._wanted.popleft()
            with self._making:
                if not (group.ready or group.refused):  # let go of meanwhile
                    self._make(group)

    def _make(self, group: _Group) -> None:
        if self._nodes >= _MOST_NODES:
            group.refused = True
            return
        self._make_current()
        try:
            for twin in group.twins:
                twin.instantiate()
        except DriverError as error:  # this graph is timed as a whole from now on, others layer by layer
            group.refused = True
            what = "its nodes are not known"
            with contextlib.suppress(DriverError):
                what = ", ".join(twin.kinds() for twin in group.twins)
            self.refusals.append(f"{error}; {what}")
            for twin in group.twins:
                twin.close()
            return
        self._nodes += group.nodes
        group.ready = True

    def _step(self, flight: _Flight) -> SampledStep:
        stamps = self._host_numpy[flight.at]
        begin, end = (_GRAPH_BEGIN, _GRAPH_END) if flight.in_graph else (_BEGIN, _END)
        if stamps[_GRAPH_BEGIN]:  # otherwise what it was the last time
            self._overhead = int(_BETWEEN * (stamps[_GRAPH_BEGIN] - stamps[_GRAPH_FIRST]))
        points = stamps[_LAYERS:].reshape(self._layers, POINTS)
        inserted = int((points > 0).sum()) + 1
        took = int(stamps[end] - stamps[begin]) - (self._overhead * inserted if flight.in_graph else self._overhead)
        stages = stages_of(points, self._overhead)
        counts = None
        if self._work.known and flight.counted:
            before, after = self._rows_numpy[flight.at]
            counts = self._work.local(before, after, self._experts)
        flops = None if counts is None else self._work.flops * counts.sum(axis=1)
        timed = stages if (stages >= 0).any() else None
        return SampledStep(flight.number, flight.kind, flight.tokens, max(0, took), timed, counts, flops)

    def close(self) -> None:
        """Let go of all twins; graphs are replayed as they are from now on."""
        self.sampling = False
        with self._lock:
            self._wanted.clear()
        groups, self._groups, self._nodes = self._groups, {}, 0
        for group in groups.values():
            group.ready, group.refused = False, True
        # This may be the thread that runs the model: should the driver hang, the twins are left where they are.
        if not self._making.acquire(timeout=_LET_GO):
            return
        try:
            for group in groups.values():
                group.ready = False  # what was being made ready
                for twin in group.twins:
                    twin.close()
        finally:
            self._making.release()
