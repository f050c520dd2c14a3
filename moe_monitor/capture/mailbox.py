# ruff: noqa: ANN001, ANN202, N803 -- how Triton kernels are written
"""How a replay of a CUDA graph learns how many tokens are real and whose they are, without a call of the driver.

Between two passes of a server all that such a call touches leaves the processor's caches: 35 to 73 us for a few bytes
on the host of an H100, where it takes 3 to 5 in a loop (benchmarks/gpu/driver_calls.py). So the host only writes to its
own memory, and the graph fetches it over the bus: a kernel of one program, at the head of a branch of the graph's own
(:meth:`Mailbox.branch`). It leaves what it fetched in the device's memory, where the kernel behind it on the branch
finds it.

The host runs ahead of the device, so there are many places. A graph that fetches counts its launches, and looks in the
place of that number; the host fills the place of the next launch. So each launch must be posted, whatever it is for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from moe_monitor.capture.control import Table
from moe_monitor.capture.driver import DriverError
from moe_monitor.capture.kernels import triton  # type: ignore[attr-defined]
from moe_monitor.capture.sending import Sender
from moe_monitor.capture.tallies import Owners, Spans, mark, moved

if triton is not None:
    import triton.language as tl

#: Places for what is posted, and for whose the rows are: a power of two. Half of them may wait for their launch; what
#: an earlier launch still reads is never overwritten.
PLACES = 64
AHEAD = PLACES // 2
#: A device that begins with nothing for so long, in seconds, will not.
_PATIENCE = 5.0
#: Rows that are fetched at a time, a power of two.
_BLOCK = 512

_ADDRESSES = ["words", "owners", "begun"]

if triton is not None:

    @triton.jit(do_not_specialize=[*_ADDRESSES, "rows"])  # type: ignore[untyped-decorator, unused-ignore]
    def _fetch_kernel(  # type: ignore[no-untyped-def]
        launches,  # int64 [1]: how many there were
        head, owners_here,  # int32 [2] and [rows], what the counting kernel reads
        words, owners, begun,  # addresses in the host's memory: int64 [PLACES], int32 [PLACES, rows], int64 [1]
        rows,
        # (a word is tokens | end << 24 | (place + 1) << 48: so many are real; whose rows up to the end are lies at
        # that place of the owners; no more than tokens where nobody is traced)
        PLACES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        launch = tl.atomic_add(launches, 1, sem="relaxed")
        place = launch % PLACES
        word = tl.load((words + place * 8).to(tl.pointer_type(tl.int64)), cache_modifier=".cv")
        tl.store(head, (word & 0xFFFFFF).to(tl.int32))
        attributed = word >> 48
        tl.store(head + 1, tl.minimum(attributed, 1).to(tl.int32))
        if attributed > 0:
            told = (owners + (attributed - 1) * rows * 4).to(tl.pointer_type(tl.int32))
            end = tl.minimum(((word >> 24) & 0xFFFFFF).to(tl.int32), rows)
            for first in range(0, end, BLOCK):
                row = first + tl.arange(0, BLOCK)
                code = tl.load(told + row, mask=row < end, other=-1, cache_modifier=".cv")
                tl.store(owners_here + row, code, mask=row < end)
        tl.store(begun.to(tl.pointer_type(tl.int64)), launch + 1)


def compile_fetch() -> None:
    """Compile the kernel for the current CUDA device; launches nothing."""
    _fetch_kernel.warmup(
        torch.int64, torch.int32, torch.int32, *(1 << 40,) * len(_ADDRESSES), 1, PLACES, _BLOCK, grid=(1,)
    )


class Mailbox(Table):
    """The head, and whose the rows are, is fetched: for graphs that count by themselves. ``rows``: that a router sees,
    at most.

    Raises DriverError where the device does not read the host's memory. Waits for the device. Attributes without an
    underscore are for :func:`moe_monitor.capture.quick.before_replay`, which posts most passes.
    """

    @torch.inference_mode(False)
    def __init__(self, device: torch.device, rows: int, addresses: int, sender: Sender | None) -> None:
        super().__init__(device, addresses)
        self.rows = rows
        self.owners = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self._fetched = torch.zeros(1, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._memory = words, owners, begun = (
            torch.zeros(PLACES, dtype=torch.int64, pin_memory=pinned),
            torch.full((PLACES, rows), -1, dtype=torch.int32, pin_memory=pinned),
            torch.zeros(1, dtype=torch.int64, pin_memory=pinned),
        )
        if pinned and sender is None:
            raise DriverError("nothing tells by which address the device reads the host's memory")
        self._at_host = [tensor.data_ptr() if sender is None else sender.address_of(tensor) for tensor in self._memory]
        # (memoryviews: quicker to write to than arrays)
        self.words, self.begun = words.numpy().data, begun.numpy().data
        self._rows = [row.data for row in owners.numpy()]
        self._nobody = np.full(rows, -1, np.int32).data
        self._written = [0] * PLACES  # up to which row
        self._place = 0
        self._attributed: tuple[Spans | None, int, int] = None, 0, 0
        #: Of the owners told of last, if they are told of by the batch's own rows; and what says in a word where.
        self.spans: Spans | None = None
        self.told = 0
        #: The branch that is open in the graph under capture.
        self._branch: torch.cuda.Stream | None = None
        self._side = torch.cuda.Stream(device) if pinned else None
        #: Launches that were posted, all in all: the next has this number.
        self.posted = 1
        self.fetch()  # loads the kernel, and shows that it works
        if (self.head.tolist(), self.begun[0]) != ([0, 0], 1):
            raise DriverError("the device does not read the host's memory as it should")

    # the capture of a graph

    def fetch(self) -> None:
        """Launch the kernel on the current stream."""
        arguments: tuple[Any, ...] = (self._fetched, self.head, self.owners, *self._at_host, self.rows)
        _fetch_kernel[(1,)](*arguments, PLACES, _BLOCK)

    @contextlib.contextmanager
    def branch(self) -> Iterator[None]:
        """The current stream is under capture. What is launched within this goes to a branch that begins here, after
        what was posted is fetched; what the current stream is given afterwards runs beside it, until :meth:`join`.
        """
        if self._side is None:
            self.fetch()
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        self._branch = self._side
        with torch.cuda.stream(self._side):
            self.fetch()
            yield

    def join(self) -> None:
        """What comes next on the current stream comes after the branch. A capture can only end when this was called."""
        branch, self._branch = self._branch, None
        if branch is not None:
            torch.cuda.current_stream(branch.device).wait_stream(branch)

    # replays

    def post(self, tokens: int, owners: Owners | None = None, start: int = 0, skip: int = 0) -> None:
        """The next replay has ``tokens`` real tokens in rows ``start`` on, of which the first is the batch's ``skip``;
        ``owners`` say whose the batch's rows are (None: nobody is traced).
        """
        self._upload()
        if owners is not None:
            if skip + tokens > owners.rows:
                raise ValueError(f"{owners.rows} rows are attributed to requests, the router saw {skip + tokens}")
            spans, *where = self._attributed
            if owners.spans is not spans or where != [start, skip]:
                self.attribute(owners, start, skip)
        self._wait()
        self.words[self.posted % PLACES] = tokens if owners is None else tokens | (start + tokens) << 24 | self.told
        self.posted += 1

    def _wait(self) -> None:
        """Until there is a place. No server runs so far ahead; whoever does is not kept, for the device has work."""
        end = 0.0
        while (waiting := self.posted - self.begun[0]) >= AHEAD:
            end = end or time.monotonic() + _PATIENCE
            if time.monotonic() > end:
                raise RuntimeError(f"{AHEAD} replays of graphs were posted, and none has begun for {_PATIENCE:g} s")
            time.sleep(1e-4)
        if waiting < 0:
            raise RuntimeError(f"{-waiting} replays of graphs were not posted")

    def attribute(self, owners: Owners, start: int, skip: int) -> None:
        """Write down whose the rows are of what is posted from now on; see :meth:`post`."""
        # No launch that has not begun means this place: since it was last written to, all others were, one a launch.
        self._place = place = (self._place + 1) % PLACES
        row, written, spans = self._rows[place], self._written[place], owners.spans
        row[:written] = self._nobody[:written]
        self._written[place] = min(self.rows, owners.rows + start - skip)
        if start or skip or owners.rows > self.rows:
            spans = moved(spans, start, skip, self.rows)
        mark(row, spans)
        self._attributed = owners.spans, start, skip
        self.spans, self.told = None if start or skip else owners.spans, (place + 1) << 48
