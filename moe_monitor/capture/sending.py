"""A few bytes from the host to the device, in the order of torch's current stream, by the driver's own functions.

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
        """``size`` bytes of pinned host memory, which must stay as they are until the copy has run."""
        self._driver.copy_in(target, source, size, torch._C._cuda_getCurrentRawStream(self._index))

    def write(self, target: int, value: int) -> None:
        """One int32. Nothing of the host's is read later, and no copy engine has to be waited for."""
        self._driver.write(target, value, torch._C._cuda_getCurrentRawStream(self._index))

    def can_write(self, place: Tensor) -> bool:
        """Whether :meth:`write` works. Tries it with the first element of ``place`` (int32), which becomes 0."""
        try:
            self.write(place.data_ptr(), 0)
        except DriverError:
            return False
        return True


def sender(device: torch.device) -> Sender | None:
    """None where there is no CUDA driver that would do: torch's own copies will."""
    if device.type != "cuda":
        return None
    try:
        return Sender(Driver(), device)
    except DriverError:
        return None
