"""A CUDA driver in a few lines, for tests without a GPU: graphs of kernels with durations, and one clock.

Kernels run one after the other, each when all that it depends on has run; a stamp writes the clock to real memory.
"""

from __future__ import annotations

import copy
import ctypes
from dataclasses import dataclass, field

from moe_monitor.capture.driver import CaptureState, DriverError, Edge

STAMP_NS = 1_000
FULL = 0


@dataclass
class Node:
    name: str
    ns: int
    argument: int = 0
    stamp: bool = False
    before: dict[int, int] = field(default_factory=dict)  # node -> edge data


class FakeDriver:
    """The interface of :class:`moe_monitor.capture.driver.Driver`, and ``kernel``/``fork``/``join`` to build graphs."""

    def __init__(self) -> None:
        self.now = 1_000_000
        self.graphs: dict[int, dict[int, Node]] = {}
        self.executables: dict[int, dict[int, Node]] = {}
        self.clones: dict[tuple[int, int], int] = {}
        self.capturing: int | None = None
        self.tails: dict[int, tuple[int, ...]] = {}
        self.ran: list[str] = []
        self.refuse: str = ""
        self._handles = iter(range(1, 1 << 30))

    def _check(self, name: str) -> None:
        if self.refuse == name:
            raise DriverError(f"{name}: CUDA_ERROR_NOT_SUPPORTED (801)")

    # what a test does

    def begin_capture(self) -> int:
        self.capturing = next(self._handles)
        self.graphs[self.capturing] = {}
        self.tails = {0: ()}
        return self.capturing

    def end_capture(self) -> int:
        graph, self.capturing = self.capturing, None
        executable = next(self._handles)
        self.executables[executable] = copy.deepcopy(self.graphs.pop(graph))  # torch keeps no graph, so nobody may ask
        return executable

    def kernel(self, name: str, ns: int, argument: int = 0, stream: int = 0, early: bool = False) -> int:
        """Launch a kernel: into the graph under capture, or now. ``early``: a programmatic start."""
        if self.capturing is None:
            self.ran.append(name)
            self.now += ns
            return 0
        node = next(self._handles)
        edges = dict.fromkeys(self.tails[stream], 7 if early else FULL)
        self.graphs[self.capturing][node] = Node(name, ns, argument, before=edges)
        self.tails[stream] = (node,)
        return node

    def fork(self, stream: int) -> None:
        self.tails[stream] = self.tails[0]

    def join(self, stream: int) -> None:
        self.tails[0] = self.tails[0] + self.tails.pop(stream)

    # the driver's interface

    def load_function(self, ptx: str, name: str) -> int:
        self._check("cuModuleLoadData")
        assert name in ptx
        return 1

    def launch(self, function: int, argument: int, stream: int) -> None:
        self._check("cuLaunchKernel")
        assert self.capturing is None
        self._stamp(argument)

    def _stamp(self, address: int) -> None:
        self.now += STAMP_NS
        ctypes.c_uint64.from_address(address).value = self.now

    def capture_state(self, stream: int) -> CaptureState | None:
        return None if self.capturing is None else CaptureState(self.capturing, self.tails[0])

    def clone(self, graph: int) -> int:
        self._check("cuGraphClone")
        new = next(self._handles)
        nodes = self.graphs[graph]
        names = {node: next(self._handles) for node in nodes}
        self.graphs[new] = {
            names[node]: Node(n.name, n.ns, n.argument, n.stamp, {names[a]: data for a, data in n.before.items()})
            for node, n in nodes.items()
        }
        self.clones |= {(node, new): name for node, name in names.items()}
        return new

    def in_clone(self, node: int, clone: int) -> int:
        assert self._of(node), "the graph of this node is gone"
        return self.clones[node, clone]

    def _of(self, node: int) -> dict[int, Node]:
        return next(graph for graph in self.graphs.values() if node in graph)

    def nodes(self, graph: int) -> list[int]:
        return list(self.graphs[graph])

    def roots(self, graph: int) -> list[int]:
        return [node for node, n in self.graphs[graph].items() if not n.before]

    def dependencies(self, node: int) -> list[Edge]:
        return [Edge(a, data) for a, data in self._of(node)[node].before.items()]

    def dependents(self, node: int) -> list[Edge]:
        return [Edge(b, n.before[node]) for b, n in self._of(node).items() if node in n.before]

    def kind(self, node: int) -> int:
        return 0

    def is_kernel(self, node: int) -> bool:
        return True

    def kernel_name(self, node: int) -> str:
        return self._of(node)[node].name

    def kernel_arguments(self, node: int) -> bytes:
        return b"\1\2" + self._of(node)[node].argument.to_bytes(8, "little")

    def add_kernel(self, graph: int, after: list[int], function: int, argument: int) -> int:
        node = next(self._handles)
        self.graphs[graph][node] = Node("stamp", STAMP_NS, argument, True, dict.fromkeys(after, FULL))
        return node

    def unlink(self, graph: int, pairs: list[tuple[int, int, int]]) -> None:
        for a, b, data in pairs:
            assert self.graphs[graph][b].before.pop(a) == data

    def link(self, graph: int, pairs: list[tuple[int, int]]) -> None:
        for a, b in pairs:
            self.graphs[graph][b].before[a] = FULL

    def instantiate(self, graph: int) -> int:
        self._check("cuGraphInstantiate")
        executable = next(self._handles)
        self.executables[executable] = copy.deepcopy(self.graphs[graph])
        return executable

    def launch_graph(self, executable: int, stream: int) -> None:
        self._check("cuGraphLaunch")
        left = dict(self.executables[executable])
        while left:  # in the order of launching among those that are ready
            node = next(node for node, n in left.items() if not any(a in left for a in n.before))
            n = left.pop(node)
            if n.stamp:
                self._stamp(n.argument)
            else:
                self.ran.append(n.name)
                self.now += n.ns

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def destroy_executable(self, executable: int) -> None:
        del self.executables[executable]
