"""A few bytes from the host to the device, by the driver's own functions.

Most of what torch takes for a few bytes is finding its way, through code that is in no cache by then: a server runs
its own work for milliseconds between two passes.
"""

from __future__ import annotations

import time
from typing import Literal

import torch
from torch import Tensor

from moe_monitor.capture.driver import Driver, DriverError

#: Seconds between two looks whether a copy has arrived, which waits for the passes that are queued: milliseconds each.
_LOOK = 0.003


def wait_for(copied: torch.cuda.Event) -> None:
    """Until the device has come so far, without Python's lock meanwhile, and with few wake-ups: it is not urgent."""
    while not copied.query():
        time.sleep(_LOOK)


class Sender:
    """Sends to one device, the current one of whoever calls. Addresses are plain integers."""

    def __init__(self, driver: Driver, device: torch.device) -> None:
        self._driver, self._index = driver, device.index

    def copy(self, target: int, source: int, size: int) -> None:
        """``size`` bytes of pinned host memory, which must stay as they are until the copy has run.

        In the order of torch's current stream.
        """
        self._driver.copy_in(target, source, size, torch._C._cuda_getCurrentRawStream(self._index))

    def address_of(self, pinned: Tensor) -> int:
        """Where kernels find pinned host memory. Raises DriverError where they cannot read it."""
        return self._driver.device_address(pinned.data_ptr())


class Ring:
    """Small arrays for kernels, one after the other. What was written into a :meth:`place` stays as it is until
    ``places`` more were asked for: as many as may be read by what is queued.

    A place has the form ``shape``. With a ``sender`` kernels read the host's memory where it lies, and nothing is
    sent: they wait a few microseconds for the bus, the host would take tens for a copy. Without, torch copies.
    """

    @torch.inference_mode(False)
    def __init__(
        self, device: torch.device, places: int, shape: tuple[int, ...], dtype: torch.dtype, sender: Sender | None
    ) -> None:
        host = torch.empty((places, *shape), dtype=dtype, pin_memory=device.type == "cuda")
        self._there = None if _read_in_place(host, sender) else torch.empty_like(host, device=device)
        self._host = host.view(places, -1)
        # as what is written to, and as what kernels are given: asking for these takes time, and numpy more of it
        code: Literal["i", "q"] = "i" if dtype == torch.int32 else "q"
        self._places = [memoryview(row.numpy()).cast("B").cast(code) for row in self._host]
        self._given = list(host if self._there is None else self._there)
        self._at = 0
        self.size = shape[0]

    def place(self) -> memoryview:
        """The next place, flat, to be written to; of the type that ``array`` calls "i" (int32) or "q" (int64)."""
        self._at = (self._at + 1) % len(self._places)
        return self._places[self._at]

    def send(self, first: int, end: int) -> Tensor:
        """That place, of which elements ``first`` to ``end`` are written, for kernels of the current stream."""
        given = self._given[self._at]
        if self._there is not None:
            given.view(-1)[first:end].copy_(self._host[self._at, first:end], non_blocking=True)
        return given


def _read_in_place(pinned: Tensor, sender: Sender | None) -> bool:
    """Whether kernels find this memory by the address that it has for the host, as wherever addresses are unified."""
    try:
        return sender is not None and sender.address_of(pinned) == pinned.data_ptr()
    except DriverError:
        return False


def sender(device: torch.device) -> Sender | None:
    """None where there is no CUDA driver that would do: torch's own copies will."""
    if device.type != "cuda":
        return None
    try:
        return Sender(Driver(), device)
    except DriverError:
        return None
