"""Columns of one layer's counter row: what the meter accumulates, the board carries and readers take apart.

Everything is int64, so that rows add up exactly over steps, ranks and devices in any order. Means of ratios are
kept as fixed-point sums in units of 1/:data:`FIXED_POINT`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moe_monitor import catalog

#: One unit of a ratio in the fixed-point sums. 2**20 keeps a mean exact to 1e-6 and 10**12 tokens inside int64.
FIXED_POINT = 1 << 20

#: Scalar columns: tokens that passed the router, passes with at least one token, tokens whose logits were NaN or
#: +inf, fixed-point sums of the three ratios, and plain sums of experts per token and active experts per pass.
SCALARS = ("tokens", "passes", "nonfinite", "entropy_sum", "top1_sum", "mass_sum", "per_token_sum", "active_sum")

#: Histograms of a row: name -> (metric of the catalogue, scalar column that holds its sum).
HISTOGRAMS = {
    "entropy": ("moe_router_entropy_ratio", "entropy_sum"),
    "top1": ("moe_router_top1_probability", "top1_sum"),
    "mass": ("moe_router_selected_mass_ratio", "mass_sum"),
    "per_token": ("moe_experts_per_token", "per_token_sum"),
    "active": ("moe_active_experts", "active_sum"),
}

#: Columns of a request's tally per layer: tokens by phase, fixed-point sums of the ratios and the smallest entropy
#: (over finite tokens only), tokens with NaN or +inf among their logits.
TALLY_COLUMNS = ("prefill", "decode", "entropy_sum", "entropy_min", "top1_sum", "mass_sum", "nonfinite", "spare")

#: ``entropy_min`` of a tally that has seen no finite token.
NO_ENTROPY = 1 << 40


def edges(histogram: str) -> tuple[float, ...]:
    """Upper bounds of a histogram's buckets, without +Inf."""
    return catalog.BY_NAME[HISTOGRAMS[histogram][0]].buckets


@dataclass(frozen=True)
class RowLayout:
    """Where each column of a row lies, for a model with ``experts`` experts per layer."""

    experts: int

    def __post_init__(self) -> None:
        if not 1 <= self.experts <= 65_536:
            raise ValueError(f"experts must lie in 1..65536, got {self.experts}")

    @cached_property
    def offsets(self) -> dict[str, slice]:
        spans = {"experts": self.experts}
        spans |= {name: len(edges(name)) + 1 for name in HISTOGRAMS}
        spans |= dict.fromkeys(SCALARS, 1)
        result, at = {}, 0
        for name, width in spans.items():
            result[name] = slice(at, at + width)
            at += width
        return result

    @property
    def width(self) -> int:
        return int(self.offsets[SCALARS[-1]].stop)

    def at(self, scalar: str) -> int:
        """Index of a scalar column."""
        return int(self.offsets[scalar].start)

    def column(self, rows: NDArray[np.int64], name: str) -> NDArray[np.int64]:
        """``rows[..., width]`` -> the named column: ``[..., n]`` for counts and histograms, ``[...]`` for scalars."""
        part = rows[..., self.offsets[name]]
        return np.asarray(part[..., 0] if name in SCALARS else part)
