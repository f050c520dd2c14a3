"""Time stamps inside CUDA graphs: an instrumented twin of a captured graph, launched on sampled steps only.

While vLLM captures a graph, marks note where in it the stream stands (:meth:`Marks.note`). When the capture ends, the
graph is cloned and a one-thread kernel is put at each mark of the clone, which writes the GPU's ``%globaltimer`` to a
slot of a buffer. The clone has the same kernels with the same arguments in the same order, so it writes the same
results to the same memory; the graph that vLLM replays is not touched, and a step that is not sampled costs nothing.

A stamp takes about a microsecond of its own, and two stamps in a row say how much, on this device: durations are the
difference of two stamps less what one adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from moe_monitor.capture.driver import Driver

#: PTX of the kernel: one thread, one argument, the address to write to.
_STAMP = """
.version 7.0
.target sm_70
.address_size 64
.visible .entry moe_monitor_stamp(.param .u64 slot)
{
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [slot];
    cvta.to.global.u64 %rd2, %rd1;
    mov.u64 %rd3, %globaltimer;
    st.global.u64 [%rd2], %rd3;
    ret;
}
"""


@dataclass
class Mark:
    """A place in a graph: after ``after``, before everything captured later than ``before_this``."""

    slot: int
    after: tuple[int, ...]
    before_this: frozenset[tuple[int, int]]


class Stamper:
    """Writes stamps of the GPU's clock to ``buffer``, a device address of 64-bit slots."""

    def __init__(self, driver: Driver, buffer: int) -> None:
        self.driver = driver
        self._buffer = buffer
        self._function = driver.load_function(_STAMP, "moe_monitor_stamp")

    def address(self, slot: int) -> int:
        return self._buffer + 8 * slot

    def stamp(self, slot: int, stream: int) -> None:
        """Now, on a stream that is not being captured."""
        self.driver.launch(self._function, self.address(slot), stream)

    def add(self, graph: int, after: Iterable[int], slot: int) -> int:
        return self.driver.add_kernel(graph, list(after), self._function, self.address(slot))


@dataclass
class Marks:
    """The marks of the graph that is being captured."""

    graph: int
    marks: list[Mark] = field(default_factory=list)

    def note(self, driver: Driver, slot: int, tail: tuple[int, ...]) -> None:
        """The stream stands behind ``tail``; whatever is captured from now on comes after the mark."""
        earlier = frozenset((a, edge.node) for a in tail for edge in driver.dependents(a))
        self.marks.append(Mark(slot, tail, earlier))


class Twin:
    """An instrumented clone of a captured graph. ``close`` before the memory that the graph uses goes away.

    Made while the graph is captured, since it may be gone later; :meth:`prepare` puts in the stamps.
    """

    def __init__(self, stamper: Stamper, graph: int, marks: list[Mark]) -> None:
        self._stamper = stamper
        self._driver = stamper.driver
        self._clone = self._driver.clone(graph)
        self._executable = 0
        self._stamps: set[int] = set()
        self._tails: dict[tuple[int, ...], int] = {}
        try:
            self._marks = [self._in_clone(mark) for mark in marks]
        except Exception:
            self.close()
            raise

    def _in_clone(self, mark: Mark) -> Mark:
        find, clone = self._driver.in_clone, self._clone
        known = frozenset((find(a, clone), find(b, clone)) for a, b in mark.before_this)
        return Mark(mark.slot, tuple(find(node, clone) for node in mark.after), known)

    def prepare(self, begin: tuple[int, int]) -> None:
        """Put in the stamps: at the marks, and two in a row before everything (slots ``begin``)."""
        for mark in self._marks:
            self._insert(mark)
        self._marks = []
        for slot in reversed(begin):
            self._insert(Mark(slot, (), frozenset()))

    @property
    def nodes(self) -> int:
        """Nodes of the twin; between :meth:`prepare` and :meth:`instantiate`."""
        return len(self._driver.nodes(self._clone))

    def _insert(self, mark: Mark) -> None:
        driver, clone = self._driver, self._clone
        if not mark.after:  # at the very beginning
            roots = driver.roots(clone)
            stamp = self._stamper.add(clone, (), mark.slot)
            driver.link(clone, [(stamp, root) for root in roots])
            self._stamps.add(stamp)
            return
        earlier = self._tails.get(mark.after)
        if earlier is not None:  # nothing was captured since the last mark
            stamp = self._stamper.add(clone, [earlier], mark.slot)
            later = [(earlier, e.node, e.data) for e in driver.dependents(earlier) if e.node != stamp]
        else:
            later = [
                (a, edge.node, edge.data)
                for a in mark.after
                for edge in driver.dependents(a)
                if edge.node not in self._stamps and (a, edge.node) not in mark.before_this
            ]
            stamp = self._stamper.add(clone, mark.after, mark.slot)
        driver.unlink(clone, later)
        driver.link(clone, sorted({(stamp, target) for _, target, _ in later}))
        self._stamps.add(stamp)
        self._tails[mark.after] = stamp

    def instantiate(self) -> None:
        """Make it ready to run; the clone is not needed any more."""
        self._executable = self._driver.instantiate(self._clone)
        self._driver.destroy_graph(self._clone)
        self._clone = 0

    def kinds(self) -> str:
        """How many nodes of which CUgraphNodeType the clone has, for a report; nothing after :meth:`instantiate`."""
        if not self._clone:
            return "ready"
        found = Counter(map(self._driver.kind, self._driver.nodes(self._clone)))
        return f"{found.total()} nodes by type {dict(sorted(found.items()))}"

    def launch(self, stream: int) -> None:
        self._driver.launch_graph(self._executable, stream)

    def close(self) -> None:
        executable, clone = self._executable, self._clone
        self._executable = self._clone = 0
        if executable:
            self._driver.destroy_executable(executable)
        if clone:
            self._driver.destroy_graph(clone)
