"""What kernels inside CUDA graphs read, and the host tells them: where the decisions lie, how many tokens are real, and
whose they are.

A replayed launch has the arguments of its capture, so what changes from pass to pass lies in device memory. It is sent
in the stream's order and only when it has changed: steady decoding sends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_monitor.capture.tallies import Codes

#: int32 places of the head: number of tokens, whether requests are traced; rows begin at an aligned address.
_HEAD = 64
#: What earlier passes were told may be on its way to the device.
_RING = 16


class Control:
    """``head`` int32 [2], ``owners`` int32 [rows] and a table of ``addresses`` pairs on the device; the way there."""

    @torch.inference_mode(False)
    def __init__(self, device: torch.device, rows: int, addresses: int) -> None:
        self.rows = rows
        pinned = device.type == "cuda"
        self._host = torch.zeros((_RING, _HEAD + rows), dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros(_HEAD + rows, dtype=torch.int32, device=device)
        self.head, self.owners = self._device[:2], self._device[_HEAD:]
        self._tokens = 0
        self._codes: Codes | None = None
        self._start = self._skip = 0
        self._at = 0
        #: Length sent -> (host as numpy, host, device) by place of the ring: slicing takes its time.
        self._views: dict[int, list[tuple[NDArray[np.int32], Tensor, Tensor]]] = {}
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
        self._at = at = (self._at + 1) % _RING
        size = 2
        if codes is not None:
            if skip + tokens > len(codes):
                raise ValueError(f"{len(codes)} rows are attributed to requests, the router saw {skip + tokens}")
            size = min(_HEAD + self.rows, _HEAD + max(64, 1 << (start + tokens - 1).bit_length()))
        views = self._views.get(size)
        if views is None:
            host, device = self._host[:, :size], self._device[:size]
            views = self._views[size] = [(host[i].numpy(), host[i], device) for i in range(_RING)]
        values, source, target = views[at]
        values[0], values[1] = tokens, codes is not None
        if codes is not None:
            values[_HEAD + start : _HEAD + start + tokens] = codes[skip : skip + tokens]
        target.copy_(source, non_blocking=True)
        self._tokens, self._codes, self._start, self._skip = tokens, codes, start, skip
