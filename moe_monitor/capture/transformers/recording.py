"""Recording: every token's routing probabilities and choices, for analyses that counters cannot answer."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_monitor.analysis.records import Record
from moe_monitor.capture.meter import probabilities
from moe_monitor.capture.transformers.count import Stream


class Recorder:
    """Keeps probabilities [layers, tokens, experts] float32 and ids on the host, up to ``limit`` bytes."""

    def __init__(self, layers: tuple[int, ...], scoring: str, limit: int) -> None:
        self._layers, self._scoring, self._limit = layers, scoring, limit
        self._parts: list[tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]] = []
        self._passes: list[int] = []
        self._sequences = 0
        self.bytes = 0
        #: Tokens that no longer fitted.
        self.dropped = 0

    def add(self, logits: list[Tensor], ids: list[Tensor], stream: Stream) -> None:
        """One pass: ``logits`` [tokens, experts] and ``ids`` [tokens, k] of each layer."""
        real, tokens, rows = stream
        total = logits[0].shape[0]
        keep = np.arange(total) if real is None else real.nonzero().squeeze(-1).cpu().numpy()
        if keep.size == 0:
            return
        size = len(logits) * keep.size * (4 * logits[0].shape[-1] + 4 * ids[0].shape[-1])
        if self.bytes + size > self._limit:
            self.dropped += int(keep.size)
            return
        index = torch.from_numpy(keep)
        p = np.stack([probabilities(x[index.to(x.device)], self._scoring)[0].cpu().numpy() for x in logits])
        chosen = np.stack([x[index.to(x.device)].cpu().numpy().astype(np.int32) for x in ids])
        names = np.full(keep.size, -1) if tokens is None else tokens.cpu().numpy()[keep]
        sequence = self._sequences + keep // max(1, total // max(1, rows))
        self._sequences += rows
        self._parts.append((p, chosen, names.astype(np.int64), sequence.astype(np.int64)))
        self._passes.append(int(keep.size))
        self.bytes += size

    def record(self) -> Record:
        """All that was recorded so far. Raises ValueError if that is nothing."""
        if not self._parts:
            raise ValueError("nothing was recorded yet")
        p, ids, names, sequence = zip(*self._parts, strict=True)
        return Record(
            layers=self._layers,
            probabilities=np.concatenate(p, axis=1),
            ids=np.concatenate(ids, axis=1),
            token_ids=np.concatenate(names),
            sequence=np.concatenate(sequence),
            passes=np.asarray(self._passes, dtype=np.int64),
        )

    def reset(self) -> None:
        self._parts.clear()
        self._passes.clear()
        self._sequences = self.bytes = self.dropped = 0
