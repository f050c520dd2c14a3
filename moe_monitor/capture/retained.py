"""The decisions of captured CUDA graphs, which their replays write anew; and whether it is safe to keep them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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


def strides_of(decisions: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Elements from one token to the next in logits and ids, [tokens, experts] and [tokens, k] of each layer.

    Raises RuntimeError where layers differ in form, or where a token's values do not lie side by side: kernels read
    all of a launch alike.
    """
    forms = {(a.dtype, a.shape, a.stride(), b.dtype, b.shape, b.stride()) for a, b in decisions}
    if len(forms) != 1:
        raise RuntimeError(f"the layers' routers differ in form: {sorted(map(str, forms))}")
    for tensor in decisions[0]:
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise RuntimeError(f"a router's decisions do not lie side by side: strides {tensor.stride()}")
    logits, ids = decisions[0]
    return logits.stride(0), ids.stride(0)


@dataclass
class Retained:
    """The decisions of one captured graph. The tensors are held for their memory while the graph is captured, so that
    nothing else in it gets that. Graphs captured later in the same pool may have it: none of these runs between the
    moment in which a graph's decisions are written and that in which they are counted.
    """

    span: Span
    tensors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    #: Layers that were seen in it, and the bytes of their decisions that were held.
    seen: set[int] = field(default_factory=set)
    nbytes: int = 0
    #: Where they lie, int64 [layers, 2], on the host and on the device; of a graph that is counted after its replays.
    addresses: Tensor | None = None
    table: Tensor | None = None
    #: Why it cannot be counted so.
    unfit: str = ""
    strides: tuple[int, int] = (0, 0)
    #: What kernels inside the graph read, where a replay counts by itself. Held for as long as the graph may run.
    mailbox: Mailbox | None = None

    #: Whether the tokens of a pass are its rows from the first on.
    whole: bool = False

    @property
    def sealed(self) -> bool:
        """Whether a replay counts by itself."""
        return self.mailbox is not None

    @property
    def most(self) -> int:
        """Tokens that a pass of the graph can have at most, of this rank."""
        return min(self.tensors[0][0].shape[0] - self.span.start, self.span.rows)

    def let_go(self) -> None:
        """The graph is captured, all of it. Cannot fail: it may never be replayed."""
        if self.mailbox is None and self.tensors:
            try:
                self.addresses = torch.tensor([(a.data_ptr(), b.data_ptr()) for a, b in self.ordered()])
            except Exception as error:
                self.unfit = str(error)
        self.nbytes = sum(tensor.nbytes for pair in self.tensors.values() for tensor in pair)
        self.tensors.clear()

    def ordered(self) -> list[tuple[Tensor, Tensor]]:
        """All layers' decisions, in order. Raises RuntimeError where they differ in form or share memory."""
        ordered = [self.tensors[i] for i in range(len(self.tensors))]
        self.strides = strides_of(ordered)
        ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for pair in ordered for t in pair)
        if any(a[1] > b[0] for a, b in itertools.pairwise(ranges)):
            raise RuntimeError("two layers' decisions share memory in a captured graph")
        return ordered


def checksum(tensor: Tensor) -> Tensor:
    """Sum over the tensor's bits, on the device: what overwrites it changes this, NaNs included."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(integers).sum(dtype=torch.int64)


class Suspects:
    """Looks in warm-up passes, those before the capture, for compiled code that reuses the memory of decisions.

    ``limit``: bytes of decisions that are kept at a time. Compares on the device, without waiting.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._noted: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._changed: Tensor | None = None

    def note(self, layer: int, logits: Tensor, ids: Tensor) -> None:
        """A router has decided; what the layer had decided before is looked at."""
        if layer in self._noted or self._bytes > self._limit:
            self.look()
        self._noted[layer] = (logits, checksum(logits), ids, checksum(ids))
        self._bytes += logits.nbytes + ids.nbytes

    def look(self) -> None:
        """A pass is over: what was noted in it must still be the same."""
        for logits, logits_sum, ids, ids_sum in self._noted.values():
            changed = (checksum(logits) != logits_sum) | (checksum(ids) != ids_sum)
            self._changed = changed if self._changed is None else self._changed | changed
        self._noted.clear()
        self._bytes = 0

    def found(self) -> bool:
        """Whether anything was found so far. Waits for the device."""
        self.look()
        return self._changed is not None and bool(self._changed.item())
