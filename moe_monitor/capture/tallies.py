"""Where traced requests are tallied: in host memory for CPUs, on the device for CUDA.

Slots are handed out and written to by the thread that runs the model. A slot that is handed back belongs to the
publisher's thread, which takes what is in it and clears it; only then is it handed out again. So no lock is needed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_monitor.capture.kernels import Tallies, tally_reference, tokens_at_a_time
from moe_monitor.capture.sending import Ring, Sender, wait_for
from moe_monitor.layout import NO_ENTROPY, TALLY_COLUMNS

_ENTROPY_MIN = TALLY_COLUMNS.index("entropy_min")

Codes = NDArray[np.int32]
#: Rows that belong to traced requests: (first, end, slot * 2 + phase); phase 0 is prefill.
Spans = list[tuple[int, int, int]]
Taken = list[tuple[NDArray[np.int32], NDArray[np.int64]]]


def slot_bytes(layers: int, experts: int) -> int:
    """Memory of one slot."""
    return layers * (2 * experts * 4 + len(TALLY_COLUMNS) * 8)


class Owners(NamedTuple):
    """Whose the ``rows`` of a pass are: of most nobody's who is traced. The same list of spans means the same rows."""

    rows: int
    spans: Spans

    def codes(self) -> Codes:
        """The spans' code for each row, -1 for the others."""
        codes = np.full(self.rows, -1, np.int32)
        for first, end, code in self.spans:
            codes[first:end] = code
        return codes


def moved(spans: Spans, start: int, skip: int, rows: int) -> Spans:
    """As they lie where the batch's row ``skip`` is row ``start`` of ``rows``."""
    by = start - skip
    there = [(max(first + by, start), min(end + by, rows), code) for first, end, code in spans]
    return [span for span in there if span[0] < span[1]]


def mark(row: memoryview, spans: Spans) -> None:
    """Write the spans' codes to ``row``, of int32. What numpy would do, sooner for few."""
    for first, end, code in spans:
        if end - first == 1:
            row[first] = code
        else:
            row[first:end] = array("i", (code,)) * (end - first)


class Store(Protocol):
    """``set_rows`` says whose the rows of the coming pass are; None: nobody's. ``take`` copies and clears slots that
    are no longer written to; it may wait for the device.
    """

    slots: int

    def set_rows(self, owners: Owners | None) -> None: ...

    def take(self, slots: Sequence[int]) -> Taken: ...


class HostTallies:
    """Tallies of a model on a CPU."""

    def __init__(self, slots: int, layers: int, experts: int) -> None:
        self.slots = slots
        self._layers, self._experts = layers, experts
        self._counts = np.zeros((slots, layers, 2, experts), dtype=np.int32)
        self._stats = np.zeros((slots, layers, len(TALLY_COLUMNS)), dtype=np.int64)
        self._stats[..., _ENTROPY_MIN] = NO_ENTROPY
        self._owners: Owners | None = None

    def set_rows(self, owners: Owners | None) -> None:
        self._owners = owners

    def add(self, logits: Tensor, ids: Tensor, scoring: str, layers: Sequence[int]) -> None:
        """Some layers' decisions of the pass: ``logits`` [layers, tokens, experts], ``ids`` [layers, tokens, k]."""
        if self._owners is None:
            return
        codes = self._owners.codes()
        if len(codes) != logits.shape[1]:
            raise ValueError(f"{len(codes)} rows are attributed to requests, the router saw {logits.shape[1]}")
        # Only the slots of this batch are touched: the others may be in the publisher's hands.
        slots, local = np.unique(codes[codes >= 0] // 2, return_inverse=True)
        own = np.full_like(codes, -1)
        own[codes >= 0] = local * 2 + codes[codes >= 0] % 2
        part = Tallies.empty(len(slots), self._layers, self._experts, "cpu")
        tally_reference(logits, ids, scoring, torch.from_numpy(own), part, layers)
        stats = part.stats.numpy()
        least = np.minimum(self._stats[slots, :, _ENTROPY_MIN], stats[..., _ENTROPY_MIN])
        self._counts[slots] += part.counts.numpy()
        self._stats[slots] += stats
        self._stats[slots, :, _ENTROPY_MIN] = least

    def take(self, slots: Sequence[int]) -> Taken:
        taken = [(self._counts[slot].copy(), self._stats[slot].copy()) for slot in slots]
        for slot in slots:
            self._counts[slot] = 0
            self._stats[slot] = 0
            self._stats[slot, :, _ENTROPY_MIN] = NO_ENTROPY
        return taken


class DeviceTallies:
    """Tallies of a model on a CUDA device. Everything is queued on the model's own stream, so order is its order.

    Made on the first router's pass, when the device is known: see :meth:`set_up`.
    """

    #: Slots taken in one go, attributions that may be queued at once, and rows for which there is room from the start.
    _BATCH, _RING, _ROWS = 32, 16, 8192

    #: So often may the programs of a launch read the host's memory, each for the tokens that it takes at a time; larger
    #: passes get a copy, for which the host takes long. An H200 read 2,048 times in 11 us and 8,192 times in 53 for 16
    #: layers of 64 experts, 7,424 times in 150 for 58 of 256 (``benchmarks/gpu/rows_in_place.py``).
    _READS = 4096

    def __init__(self, slots: int, layers: int, experts: int) -> None:
        self.slots = slots
        self._shape = (slots, layers, experts)
        self.tallies: Tallies | None = None
        #: Whose the rows of the coming pass are.
        self.owners: Owners | None = None
        self._sent: tuple[Owners, int, int, int] | None = None
        self._sent_to: Tensor | None = None
        self._outgrown: list[Ring] = []
        self._stream: torch.cuda.Stream | None = None

    @property
    def bytes(self) -> int:
        slots, layers, experts = self._shape
        return slots * slot_bytes(layers, experts)

    @torch.inference_mode(False)
    def set_up(self, device: torch.device, sender: Sender | None = None) -> Tallies:
        slots, layers, experts = self._shape
        self._device, self._pinned = device, device.type == "cuda"
        self.tallies = made = Tallies.empty(slots, layers, experts, device)
        n, pin = self._BATCH, self._pinned
        self._counts_out = torch.empty((n, *made.counts.shape[1:]), dtype=torch.int32, pin_memory=pin)
        self._stats_out = torch.empty((n, *made.stats.shape[1:]), dtype=torch.int64, pin_memory=pin)
        self._index = torch.zeros(n, dtype=torch.int64, pin_memory=pin)
        self._index_device = torch.zeros(self._BATCH, dtype=torch.int64, device=device)
        few = min(max(1, self._READS // layers) * tokens_at_a_time(experts), self._ROWS)
        self._ring, self._wide = self._ring_of(few, sender), self._ring_of(self._ROWS, None)
        self.take([0])  # loads the kernels now rather than while serving
        return made

    def _ring_of(self, rows: int, sender: Sender | None) -> Ring:
        self._nobody = memoryview(array("i", (-1,)) * rows)
        return Ring(self._device, self._RING, (rows,), torch.int32, sender)

    def set_rows(self, owners: Owners | None) -> None:
        self.owners = owners

    def rows(self, start: int, skip: int, n: int) -> Tensor | None:
        """The attribution, where kernels find it, for a launch over ``n`` router rows from ``start`` on, of which the
        first is the batch's row ``skip``. None: nobody is traced, and the cheaper kernel will do.

        Indexed as the router's rows are. Sent once for the launches of a pass.
        """
        owners = self.owners
        if owners is None or n <= 0:
            return None
        wanted = (owners, start, skip, n)
        if self._sent is not None and self._sent[0] is owners and self._sent[1:] == wanted[1:]:
            return self._sent_to
        if skip + n > owners.rows:
            raise ValueError(f"{owners.rows} rows are attributed to requests, the router saw {skip + n}")
        ring, end = self._ring, start + n
        if end > ring.size:
            if end > self._wide.size:
                self._outgrown.append(self._wide)  # copies out of it may not have run yet
                self._wide = self._ring_of(2 * end, None)
            ring = self._wide
        place = ring.place()
        place[start:end] = self._nobody[:n]
        spans = owners.spans if start == skip == 0 and n == owners.rows else moved(owners.spans, start, skip, end)
        mark(place, spans)
        self._sent, self._sent_to = wanted, ring.send(start, end)
        return self._sent_to

    def launched_on(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    @torch.inference_mode(False)
    def take(self, slots: Sequence[int]) -> Taken:
        if self.tallies is None:
            raise RuntimeError("tallies are asked for before the first pass")
        taken: Taken = []
        for first in range(0, len(slots), self._BATCH):
            batch = list(slots[first : first + self._BATCH])
            self._index[:] = torch.tensor(batch + batch[-1:] * (self._BATCH - len(batch)))
            if self._stream is None:
                self._queue_take()
                if self._pinned:
                    torch.cuda.current_stream(self._device).synchronize()
            else:
                with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                    self._queue_take()
                    done = self._stream.record_event()
                wait_for(done)
            counts, stats = self._counts_out.numpy(), self._stats_out.numpy()
            taken += [(counts[i].copy(), stats[i].copy()) for i in range(len(batch))]
        return taken

    def _queue_take(self) -> None:
        assert self.tallies is not None
        counts, stats = self.tallies
        index = self._index_device
        index.copy_(self._index, non_blocking=True)
        self._counts_out.copy_(counts.index_select(0, index), non_blocking=True)
        self._stats_out.copy_(stats.index_select(0, index), non_blocking=True)
        counts.index_fill_(0, index, 0)
        stats.index_fill_(0, index, 0)
        stats[..., _ENTROPY_MIN].index_fill_(0, index, NO_ENTROPY)
