"""What is kept of a captured CUDA graph: the routers' decisions, which its replays write anew."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_monitor.capture.mailbox import Mailbox


@dataclass(frozen=True)
class Span:
    """Where this rank's tokens lie in what a router saw.

    Rows from ``start`` on, at most ``rows`` of them; the first ``skip`` tokens of the batch went to other ranks.
    """

    start: int = 0
    rows: int = 1 << 30
    skip: int = 0

    def valid(self, tokens: int) -> int:
        return max(0, min(tokens - self.skip, self.rows))


@dataclass
class Retained:
    """The decisions of one captured graph; the tensors are held for their memory."""

    span: Span
    tensors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    table: Tensor | None = None
    strides: tuple[int, int] = (0, 0)
    #: What kernels inside the graph read, where a replay counts by itself. Held for as long as the graph may run.
    mailbox: Mailbox | None = None

    @property
    def sealed(self) -> bool:
        """Whether a replay counts by itself."""
        return self.mailbox is not None

    def ordered(self) -> list[tuple[Tensor, Tensor]]:
        """All layers' decisions, in order. Raises RuntimeError where they differ in form or share memory."""
        ordered = [self.tensors[i] for i in range(len(self.tensors))]
        forms = {(a.dtype, a.shape, a.stride(), b.dtype, b.shape, b.stride()) for a, b in ordered}
        if len(forms) != 1:
            raise RuntimeError(f"the layers' routers differ in form: {sorted(map(str, forms))}")
        ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for pair in ordered for t in pair)
        if any(a[1] > b[0] for a, b in itertools.pairwise(ranges)):
            raise RuntimeError("two layers' decisions share memory in a captured graph")
        self.strides = (ordered[0][0].stride(0), ordered[0][1].stride(0))
        return ordered


def checksum(tensor: Tensor) -> Tensor:
    """Sum over the tensor's bits, on the device: what overwrites it changes this, NaNs included."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(integers).sum(dtype=torch.int64)
