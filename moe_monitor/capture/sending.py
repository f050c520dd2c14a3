"""A few bytes from the host to the device, by the driver's own functions.

Most of what torch takes for a few bytes is finding its way, through code that is in no cache by then: a server runs
its own work for milliseconds between two passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_monitor.capture.driver import Driver, DriverError


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


def sender(device: torch.device) -> Sender | None:
    """None where there is no CUDA driver that would do: torch's own copies will."""
    if device.type != "cuda":
        return None
    try:
        return Sender(Driver(), device)
    except DriverError:
        return None
