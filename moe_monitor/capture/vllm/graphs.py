"""Seam: the moment in which vLLM's capture of a CUDA graph ends, and the graph's replays.

At that moment the branch that counts the pass must be closed, and a copy for timing can be made.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from moe_monitor.capture.cuda import CudaMeter
from moe_monitor.capture.retained import Retained
from moe_monitor.capture.vllm.context import graph_key

if TYPE_CHECKING:
    from moe_monitor.capture.vllm.attach import Capture


@contextmanager
def capturing(capture: Capture) -> Iterator[None]:
    """While vLLM captures its graphs."""
    original = torch.cuda.CUDAGraph.capture_end
    timing = capture.timing

    def capture_end(graph: Any) -> None:
        key: Hashable | None = None
        sealed: Retained | None = None
        with capture.fuse.guard("record", serving=False):
            if not capture.fuse.blown:
                key = graph_key()
                key = capture.capturing if key is None else key
        if key is not None and timing is not None:
            timing.note_end(key)  # before the branch that is ours comes back
        with capture.fuse.guard("record", serving=False):
            if isinstance(capture.meter, CudaMeter):
                sealed = capture.meter.graphs.end_capture(key)
        if key is not None and timing is not None:
            timing.lay_twin_aside(graph, key)
        original(graph)
        if sealed is not None:
            with capture.fuse.guard("record", serving=False):
                capture.watch_replays(graph, sealed)

    if timing is not None:
        timing.before_graphs()
    if isinstance(capture.meter, CudaMeter):
        capture.meter.graphs.sealing = True
    torch.cuda.CUDAGraph.capture_end = capture_end  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.cuda.CUDAGraph.capture_end = original  # type: ignore[method-assign]
        with capture.fuse.guard("record", serving=False):
            if isinstance(capture.meter, CudaMeter):
                capture.meter.graphs.sealing = False
                capture.meter.graphs.after_capture()
        if timing is not None:
            timing.after_graphs()
