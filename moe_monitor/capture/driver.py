"""The few functions of the CUDA driver that torch does not offer, or only by a long way: looking into a captured graph,
adding to a copy, sending a few bytes.

Called through ctypes: libcuda is there wherever CUDA is. Structures and signatures are those of ``cuda.h`` since CUDA
12.4 (driver 550); where the driver is older or a symbol is missing, :func:`load` raises DriverError.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_void_p
from typing import Any, NamedTuple

#: CU_GRAPH_NODE_TYPE_KERNEL
_KERNEL_NODE = 0
#: CU_STREAM_CAPTURE_STATUS_ACTIVE
_CAPTURING = 1


class DriverError(RuntimeError):
    """The driver lacks a function or refused a call; the message names it."""


class _Edge(Structure):
    """CUgraphEdgeData: all zero is a full dependency, anything else an early (programmatic) start."""

    _fields_ = (("from_port", c_ubyte), ("to_port", c_ubyte), ("kind", c_ubyte), ("reserved", c_ubyte * 5))


class _KernelParams(Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2"""

    _fields_ = (
        ("func", c_void_p),
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("params", POINTER(c_void_p)),
        ("extra", POINTER(c_void_p)),
        ("kernel", c_void_p),
        ("context", c_void_p),
    )


#: Symbol -> argument types; all return CUresult.
_SYMBOLS: dict[str, tuple[Any, ...]] = {
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuMemcpyHtoDAsync_v2": (c_ulonglong, c_void_p, c_size_t, c_void_p),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_ulonglong), c_void_p, c_uint),
    "cuStreamGetCaptureInfo_v3": (
        c_void_p,
        POINTER(c_int),
        POINTER(c_ulonglong),
        POINTER(c_void_p),
        POINTER(POINTER(c_void_p)),
        POINTER(c_void_p),
        POINTER(c_size_t),
    ),
    "cuGraphClone": (POINTER(c_void_p), c_void_p),
    "cuGraphNodeFindInClone": (POINTER(c_void_p), c_void_p, c_void_p),
    "cuGraphGetNodes": (c_void_p, POINTER(c_void_p), POINTER(c_size_t)),
    "cuGraphGetRootNodes": (c_void_p, POINTER(c_void_p), POINTER(c_size_t)),
    "cuGraphNodeGetType": (c_void_p, POINTER(c_int)),
    "cuGraphNodeGetDependencies_v2": (c_void_p, POINTER(c_void_p), POINTER(_Edge), POINTER(c_size_t)),
    "cuGraphNodeGetDependentNodes_v2": (c_void_p, POINTER(c_void_p), POINTER(_Edge), POINTER(c_size_t)),
    "cuGraphAddDependencies_v2": (c_void_p, POINTER(c_void_p), POINTER(c_void_p), POINTER(_Edge), c_size_t),
    "cuGraphRemoveDependencies_v2": (c_void_p, POINTER(c_void_p), POINTER(c_void_p), POINTER(_Edge), c_size_t),
    "cuGraphAddKernelNode_v2": (POINTER(c_void_p), c_void_p, POINTER(c_void_p), c_size_t, POINTER(_KernelParams)),
    "cuGraphKernelNodeGetParams_v2": (c_void_p, POINTER(_KernelParams)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
    "cuFuncGetName": (POINTER(c_char_p), c_void_p),
    "cuKernelGetName": (POINTER(c_char_p), c_void_p),
    "cuFuncGetParamInfo": (c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t)),
    "cuKernelGetParamInfo": (c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t)),
}


class CaptureState(NamedTuple):
    """The graph that a stream is captured into, and the nodes that the next one will depend on."""

    graph: int
    tail: tuple[int, ...]


class Edge(NamedTuple):
    """A neighbour of a node, with the edge's data (0: a full dependency)."""

    node: int
    data: int


class Driver:
    """Handles are plain integers. Every method raises DriverError when the driver refuses."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverError(f"no CUDA driver: {error}") from error
        self._calls: dict[str, Any] = {}
        for name, arguments in _SYMBOLS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise DriverError(f"the CUDA driver has no {name}; driver 550 or newer is needed") from None
            function.argtypes, function.restype = arguments, c_int
            self._calls[name] = function

    def _call(self, name: str, *arguments: Any) -> None:
        code = self._calls[name](*arguments)
        if code:
            text = c_char_p()
            self._calls["cuGetErrorName"](code, byref(text))
            raise DriverError(f"{name}: {(text.value or b'?').decode()} ({code})")

    # kernels

    def load_function(self, ptx: str, name: str) -> int:
        """A kernel from PTX, compiled by the driver for the device of the current context."""
        module, function = c_void_p(), c_void_p()
        self._call("cuModuleLoadData", byref(module), ptx.encode())
        self._call("cuModuleGetFunction", byref(function), module, name.encode())
        return int(function.value or 0)

    def launch(self, function: int, argument: int, stream: int) -> None:
        """One thread of a kernel that takes one 64-bit argument."""
        value = c_ulonglong(argument)
        params = (c_void_p * 1)(ctypes.addressof(value))
        self._call("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, stream, params, None)

    def copy_in(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes from pinned host memory to the device."""
        self._call("cuMemcpyHtoDAsync_v2", target, source, size, stream)

    def device_address(self, pinned: int) -> int:
        """Address by which kernels read pinned host memory."""
        address = c_ulonglong()
        self._call("cuMemHostGetDevicePointer_v2", byref(address), pinned, 0)
        return address.value

    # graphs under capture

    def capture_state(self, stream: int) -> CaptureState | None:
        """None when the stream is not being captured."""
        status, ident, graph = c_int(), c_ulonglong(), c_void_p()
        nodes, edges, count = POINTER(c_void_p)(), c_void_p(), c_size_t()
        pointers = (byref(status), byref(ident), byref(graph), byref(nodes), byref(edges), byref(count))
        self._call("cuStreamGetCaptureInfo_v3", stream, *pointers)
        if status.value != _CAPTURING:
            return None
        return CaptureState(int(graph.value or 0), tuple(int(nodes[i] or 0) for i in range(count.value)))

    def clone(self, graph: int) -> int:
        copy = c_void_p()
        self._call("cuGraphClone", byref(copy), graph)
        return int(copy.value or 0)

    def in_clone(self, node: int, clone: int) -> int:
        found = c_void_p()
        self._call("cuGraphNodeFindInClone", byref(found), node, clone)
        return int(found.value or 0)

    # nodes

    def _nodes(self, name: str, graph: int) -> list[int]:
        count = c_size_t()
        self._call(name, graph, None, byref(count))
        nodes = (c_void_p * max(1, count.value))()
        if count.value:
            self._call(name, graph, nodes, byref(count))
        return [int(nodes[i] or 0) for i in range(count.value)]

    def nodes(self, graph: int) -> list[int]:
        return self._nodes("cuGraphGetNodes", graph)

    def roots(self, graph: int) -> list[int]:
        return self._nodes("cuGraphGetRootNodes", graph)

    def _neighbours(self, name: str, node: int) -> list[Edge]:
        count = c_size_t()
        self._call(name, node, None, None, byref(count))
        if not count.value:
            return []
        nodes, edges = (c_void_p * count.value)(), (_Edge * count.value)()
        self._call(name, node, nodes, edges, byref(count))
        data = ctypes.cast(edges, POINTER(c_ulonglong))
        return [Edge(int(nodes[i] or 0), int(data[i])) for i in range(count.value)]

    def dependencies(self, node: int) -> list[Edge]:
        return self._neighbours("cuGraphNodeGetDependencies_v2", node)

    def dependents(self, node: int) -> list[Edge]:
        return self._neighbours("cuGraphNodeGetDependentNodes_v2", node)

    def kind(self, node: int) -> int:
        """The node's CUgraphNodeType."""
        kind = c_int()
        self._call("cuGraphNodeGetType", node, byref(kind))
        return kind.value

    def is_kernel(self, node: int) -> bool:
        return self.kind(node) == _KERNEL_NODE

    def _params(self, node: int) -> _KernelParams:
        params = _KernelParams()
        self._call("cuGraphKernelNodeGetParams_v2", node, byref(params))
        return params

    def kernel_name(self, node: int) -> str:
        """Mangled name of a kernel node's function."""
        params, name = self._params(node), c_char_p()
        if params.func:
            self._call("cuFuncGetName", byref(name), params.func)
        else:
            self._call("cuKernelGetName", byref(name), params.kernel)
        return (name.value or b"").decode(errors="replace")

    def kernel_arguments(self, node: int) -> bytes:
        """The bytes of a kernel node's arguments, one after the other; empty where the driver does not tell."""
        params = self._params(node)
        if not params.params:
            return b""
        info = "cuFuncGetParamInfo" if params.func else "cuKernelGetParamInfo"
        handle, result = params.func or params.kernel, b""
        offset, size = c_size_t(), c_size_t()
        for index in range(512):
            if self._calls[info](handle, index, byref(offset), byref(size)):
                break  # no more parameters
            result += ctypes.string_at(params.params[index], size.value)
        return result

    # adding to a graph

    def add_kernel(self, graph: int, after: Sequence[int], function: int, argument: int) -> int:
        """A node that runs one thread of ``function`` with one 64-bit argument, after the nodes given."""
        value = c_ulonglong(argument)
        slots = (c_void_p * 1)(ctypes.addressof(value))
        one = (c_uint * 3)(1, 1, 1)
        params = _KernelParams(func=function, grid=one, block=one, params=slots)
        node = c_void_p()
        self._call("cuGraphAddKernelNode_v2", byref(node), graph, (c_void_p * len(after))(*after), len(after), params)
        return int(node.value or 0)

    def _edges(self, name: str, graph: int, pairs: Sequence[tuple[int, int, int]]) -> None:
        n = len(pairs)
        sources, targets = (c_void_p * n)(*[p[0] for p in pairs]), (c_void_p * n)(*[p[1] for p in pairs])
        data = (c_ulonglong * n)(*[p[2] for p in pairs])
        self._call(name, graph, sources, targets, ctypes.cast(data, POINTER(_Edge)), n)

    def unlink(self, graph: int, pairs: Sequence[tuple[int, int, int]]) -> None:
        """Remove edges (from, to, data as :class:`Edge` has it)."""
        if pairs:
            self._edges("cuGraphRemoveDependencies_v2", graph, pairs)

    def link(self, graph: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Add full dependencies (from, to)."""
        if pairs:
            self._edges("cuGraphAddDependencies_v2", graph, [(a, b, 0) for a, b in pairs])

    # running one

    def instantiate(self, graph: int) -> int:
        executable = c_void_p()
        self._call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
        return int(executable.value or 0)

    def launch_graph(self, executable: int, stream: int) -> None:
        self._call("cuGraphLaunch", executable, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphDestroy", graph)

    def destroy_executable(self, executable: int) -> None:
        self._call("cuGraphExecDestroy", executable)
