"""A few bytes from the host to the device, by the driver's own functions.

Most of what torch takes for a few bytes is finding its way, through code that is in no cache by then: a server runs
its own work for milliseconds between two passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
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
    """Small arrays on their way to the device, one after the other. What was sent stays as it is, here and there, until
    ``places`` more were: as many as may be read by what is queued.

    A place has the form ``shape``. ``sender``: the short way; None: torch's copies.
    """

    @torch.inference_mode(False)
    def __init__(
        self, device: torch.device, places: int, shape: tuple[int, ...], dtype: torch.dtype, sender: Sender | None
    ) -> None:
        self._memory = host, there = (
            torch.empty((places, *shape), dtype=dtype, pin_memory=device.type == "cuda"),
            torch.empty((places, *shape), dtype=dtype, device=device),
        )
        # on the host as numpy, where it lies there, on the device and where it lies there: asking for these takes time
        self._places = [(a.numpy(), a.data_ptr(), b, b.data_ptr()) for a, b in zip(host, there, strict=True)]
        self._row_bytes = dtype.itemsize * math.prod(shape[1:])
        self._sender = sender
        self._at = 0
        self.size = shape[0]

    def send(self, values: NDArray[Any] | Sequence[Any], first: int = 0) -> Tensor:
        """A place on the device, in which ``values`` are once this has run in the current stream's order, from element
        ``first`` on.
        """
        self._at = (self._at + 1) % len(self._places)
        host, source, device, target = self._places[self._at]
        end, offset = first + len(values), first * self._row_bytes
        host[first:end] = values
        if self._sender is not None:
            self._sender.copy(target + offset, source + offset, (end - first) * self._row_bytes)
        else:
            device[first:end].copy_(torch.from_numpy(host[first:end]), non_blocking=True)
        return device


def sender(device: torch.device) -> Sender | None:
    """None where there is no CUDA driver that would do: torch's own copies will."""
    if device.type != "cuda":
        return None
    try:
        return Sender(Driver(), device)
    except DriverError:
        return None
