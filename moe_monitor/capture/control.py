"""What kernels inside CUDA graphs read: where the decisions lie, and how many tokens are real.

A replayed launch has the arguments of its capture, so what changes from pass to pass lies in device memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_monitor.capture.sending import Sender

#: Numbers of tokens on their way to the device at a time.
_RING = 16


class Table:
    """``head`` int32 [2] (number of tokens; whether requests are traced) and a table of ``addresses`` pairs on the
    device. Must live for as long as a graph may run whose kernels read it.
    """

    @torch.inference_mode(False)
    def __init__(self, device: torch.device, addresses: int) -> None:
        self.head = torch.zeros(2, dtype=torch.int32, device=device)
        self._table = torch.zeros((addresses, 2), dtype=torch.int64, device=device)
        self._table_host = np.zeros((addresses, 2), dtype=np.int64)
        self._reserved = self._uploaded = 0
        #: Whether something was reserved since.
        self.unsent = False

    def has_room(self, n: int) -> bool:
        """Whether so many more pairs of addresses fit."""
        return self._reserved + n <= len(self._table_host)

    def reserve(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Places int64 [n, 2] in the table for the addresses of (logits, ids), which are there once a replay was told
        of next. Sends nothing by itself: a graph is being captured.
        """
        first, self._reserved = self._reserved, self._reserved + len(pairs)
        self.unsent = True
        self._table_host[first : self._reserved] = [(a.data_ptr(), b.data_ptr()) for a, b in pairs]
        return self._table[first : self._reserved]

    def _upload(self) -> None:
        """Before whatever a replay is told: what was reserved goes to the device, once."""
        if self.unsent:
            self._send_fresh()

    @torch.inference_mode(False)
    def _send_fresh(self) -> None:
        fresh = slice(self._uploaded, self._reserved)
        self._table[fresh] = torch.from_numpy(self._table_host[fresh]).to(self._table.device)
        self._uploaded, self.unsent = self._reserved, False


class Control(Table):
    """The head is sent. ``sender``: the short way to the device; None: torch's copies."""

    @torch.inference_mode(False)
    def __init__(self, device: torch.device, addresses: int, sender: Sender | None = None) -> None:
        super().__init__(device, addresses)
        self._host = torch.zeros((_RING, 2), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._sender = sender
        self._tokens = 0
        self._at = 0

    def tell(self, tokens: int) -> None:
        """From now on passes have ``tokens`` real tokens, and nobody is traced: sent in the order of the current
        stream, which must not be under capture, and only when it has changed.
        """
        self._upload()
        if tokens == self._tokens:
            return
        self._at = at = (self._at + 1) % _RING
        self._host[at, 0] = tokens
        if self._sender is not None:
            self._sender.copy(self.head.data_ptr(), self._host[at].data_ptr(), self.head.nbytes)
        else:
            self.head.copy_(self._host[at], non_blocking=True)
        self._tokens = tokens
