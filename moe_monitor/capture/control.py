"""What kernels inside CUDA graphs read, and the host tells them: where the decisions lie, how many tokens are real, and
whose they are.

A replayed launch has the arguments of its capture, so what changes from pass to pass lies in device memory. It is sent
in the stream's order and only when it has changed: steady decoding sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe_monitor.capture.sending import Sender
from moe_monitor.capture.tallies import Codes

#: int32 places of the head: number of tokens, whether requests are traced; rows begin at an aligned address.
_HEAD = 64
#: What earlier passes were told may be on its way to the device.
_RING = 16


class Control:
    """``head`` int32 [2], ``owners`` int32 [rows] and a table of ``addresses`` pairs on the device; the way there.

    ``sender``: the short way; None: torch's copies. The device's current stream must not be under capture.
    """

    @torch.inference_mode(False)
    def __init__(self, device: torch.device, rows: int, addresses: int, sender: Sender | None = None) -> None:
        self.rows = rows
        pinned = device.type == "cuda"
        self._host = torch.zeros((_RING, _HEAD + rows), dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros(_HEAD + rows, dtype=torch.int32, device=device)
        #: Places of the ring: as numpy, and where they lie.
        self._places = [(place.numpy(), place.data_ptr()) for place in self._host]
        self._target = self._device.data_ptr()
        self._sender = sender
        self._writes = sender is not None and sender.can_write(self._device)
        self.head, self.owners = self._device[:2], self._device[_HEAD:]
        self._tokens = 0
        self._codes: Codes | None = None
        self._start = self._skip = 0
        self._at = 0
        self._table = torch.zeros((addresses, 2), dtype=torch.int64, device=device)
        self._table_host = np.zeros((addresses, 2), dtype=np.int64)
        self._reserved = self._uploaded = 0

    def has_room(self, n: int) -> bool:
        """Whether so many more pairs of addresses fit."""
        return self._reserved + n <= len(self._table_host)

    def reserve(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Places int64 [n, 2] in the table for the addresses of (logits, ids), which are there once :meth:`tell` was
        called next. Sends nothing by itself: a graph is being captured.
        """
        first, self._reserved = self._reserved, self._reserved + len(pairs)
        self._table_host[first : self._reserved] = [(a.data_ptr(), b.data_ptr()) for a, b in pairs]
        return self._table[first : self._reserved]

    @torch.inference_mode(False)
    def _upload(self) -> None:
        fresh = slice(self._uploaded, self._reserved)
        self._table[fresh] = torch.from_numpy(self._table_host[fresh]).to(self._table.device)
        self._uploaded = self._reserved

    def tell(self, tokens: int, codes: Codes | None = None, start: int = 0, skip: int = 0) -> None:
        """The next replay has ``tokens`` real tokens in rows ``start`` on, of which the first is the batch's ``skip``;
        ``codes`` say whose the batch's rows are (None: nobody is traced).
        """
        if self._uploaded < self._reserved:
            self._upload()
        if tokens == self._tokens and codes is self._codes and start == self._start and skip == self._skip:
            return
        if codes is None and self._writes:
            assert self._sender is not None
            if self._codes is not None:
                self._sender.write(self._target + 4, 0)
            self._sender.write(self._target, tokens)
        else:
            self._copy(tokens, codes, start, skip)
        self._tokens, self._codes, self._start, self._skip = tokens, codes, start, skip

    def _copy(self, tokens: int, codes: Codes | None, start: int, skip: int) -> None:
        self._at = at = (self._at + 1) % _RING
        values, source = self._places[at]
        values[0], values[1] = tokens, codes is not None
        size = 2
        if codes is not None:
            if skip + tokens > len(codes):
                raise ValueError(f"{len(codes)} rows are attributed to requests, the router saw {skip + tokens}")
            size = _HEAD + start + tokens
            values[_HEAD + start : size] = codes[skip : skip + tokens]
        if self._sender is not None:
            self._sender.copy(self._target, source, size * values.itemsize)
        else:
            self._device[:size].copy_(self._host[at, :size], non_blocking=True)
