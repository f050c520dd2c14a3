"""A record: what every token's routers did, layer by layer, as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Record:
    """Routing of ``tokens`` tokens through ``layers``.

    layers: model layer indices. probabilities: float32 [layers, tokens, experts], the routing distribution.
    ids: int32 [layers, tokens, k] chosen experts; outside 0..experts-1 means none. token_ids: int64 [tokens],
    -1 where the model was given embeddings. sequence: int64 [tokens], which input sequence a token belongs to.
    passes: int64 [passes], tokens of each forward pass, in the order of the token axis.
    """

    layers: tuple[int, ...]
    probabilities: NDArray[np.float32]
    ids: NDArray[np.int32]
    token_ids: NDArray[np.int64]
    sequence: NDArray[np.int64]
    passes: NDArray[np.int64]

    def __post_init__(self) -> None:
        n, tokens, _ = self.probabilities.shape
        if (
            n != len(self.layers)
            or self.ids.shape[:2] != (n, tokens)
            or self.token_ids.shape != (tokens,)
            or self.sequence.shape != (tokens,)
            or self.passes.sum() != tokens
        ):
            raise ValueError("the arrays of a record do not fit together")

    @property
    def experts(self) -> int:
        return int(self.probabilities.shape[2])

    @property
    def tokens(self) -> int:
        return int(self.probabilities.shape[1])

    def chosen(self) -> NDArray[np.bool_]:
        """Whether an expert was chosen: bool [layers, tokens, experts]."""
        real = (self.ids >= 0) & (self.ids < self.experts)
        result = np.zeros((*self.ids.shape[:2], self.experts + 1), dtype=bool)
        np.put_along_axis(result, np.where(real, self.ids, self.experts).astype(np.int64), values=True, axis=2)
        return result[..., :-1]

    def counts(self) -> NDArray[np.int64]:
        """Tokens per [layer, expert]."""
        return np.asarray(self.chosen().sum(axis=1), dtype=np.int64)

    def blocks(self, least: int = 32) -> NDArray[np.int64]:
        """Tokens per [block, layer, expert], a block being whole neighbouring sequences of at least ``least`` tokens.

        Blocks are what :func:`moe_monitor.analysis.compare.compare` shuffles, so that tokens of one text stay together.
        """
        chosen = self.chosen()
        starts = [0, *(np.flatnonzero(np.diff(self.sequence)) + 1).tolist(), self.tokens]
        result, begin = [], 0
        for end in starts[1:]:
            if end - begin >= least:
                result.append(chosen[:, begin:end].sum(axis=1))
                begin = end
        if begin < self.tokens:
            rest = chosen[:, begin:].sum(axis=1)
            if result:
                result[-1] = result[-1] + rest
            else:
                result.append(rest)
        return np.asarray(result, dtype=np.int64)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a compressed .npz."""
        np.savez_compressed(path, layers=np.asarray(self.layers), **{k: getattr(self, k) for k in _ARRAYS})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Record:
        """Read what :meth:`save` wrote. Raises OSError, ValueError or KeyError for anything else."""
        with np.load(path, allow_pickle=False) as data:
            return cls(tuple(int(i) for i in data["layers"]), **{k: data[k] for k in _ARRAYS})


_ARRAYS = ("probabilities", "ids", "token_ids", "sequence", "passes")
