"""What imbalance costs: a model of expert time fitted to measured layers, asked about a balanced load.

The time of a layer's expert GEMMs is modelled as linear in what grouped GEMM kernels do (tokens of an expert are padded
to tiles; an expert with any token has its weights read):

    seconds = b0 + b1 * experts with tokens + b2 * tiles of 16 tokens + b3 * tiles of 64 tokens + b4 * busiest expert

The coefficients come from ridge regression of relative errors over all layers of the sampled steps, on features scaled
to unit size. Steps are held out of the fit to state its error. Pure numpy, nothing of ours.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

#: Every so many steps one is held out of the fit, and judged by it.
HOLD_OUT = 5
#: Steps before the model is asked anything, and steps after which an old one has half its weight.
LEAST_STEPS, HALF_LIFE = 30, 2000.0

_FADE = 0.5 ** (1 / HALF_LIFE)
_RIDGE = 1e-4
_KEPT_ERRORS = 400
#: A balanced load is judged only within what was seen: features may lie this much outside.
_MARGIN = 0.5


def features(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """``counts`` [layers, experts] tokens of one step on this rank's experts -> [layers, 5]."""
    c = np.asarray(counts, dtype=np.int64)
    return np.stack(
        [
            np.ones(c.shape[0]),
            (c > 0).sum(axis=1),
            (-(-c // 16)).sum(axis=1),
            (-(-c // 64)).sum(axis=1),
            c.max(axis=1),
        ],
        axis=1,
    ).astype(np.float64)


def balanced(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same number of assignments per layer, spread as evenly as whole tokens allow."""
    total, experts = counts.sum(axis=1), counts.shape[1]
    share, rest = np.divmod(total, experts)
    return np.asarray(share[:, None] + (np.arange(experts)[None, :] < rest[:, None]), dtype=np.int64)


class _Fit:
    """Ridge regression of relative errors, with old steps fading; and the range of what it has seen."""

    def __init__(self) -> None:
        self._gram = np.zeros((5, 5))
        self._moment = np.zeros(5)
        self._low, self._high = np.full(5, np.inf), np.full(5, -np.inf)
        self.steps = 0

    def add(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        scaled = x / y[:, None]  # relative errors count: a short step as much as a long one
        self._gram = self._gram * _FADE + scaled.T @ scaled
        self._moment = self._moment * _FADE + scaled.sum(axis=0)
        self._low, self._high = np.minimum(self._low, x.min(axis=0)), np.maximum(self._high, x.max(axis=0))
        self.steps += 1

    def coefficients(self) -> NDArray[np.float64]:
        scale = np.sqrt(np.maximum(np.diag(self._gram), 1e-30))
        ridge = _RIDGE * np.eye(5)
        ridge[0, 0] = 0
        return np.asarray(np.linalg.solve(self._gram / np.outer(scale, scale) + ridge, self._moment / scale) / scale)

    def known(self, x: NDArray[np.float64]) -> NDArray[np.bool_]:
        room = _MARGIN * np.maximum(self._high, 1)
        return np.asarray(((x >= self._low - room) & (x <= self._high + room)).all(axis=1))


class CostModel:
    """Fits itself to steps as they come. Not thread-safe.

    Steps of very different size are bound by different things (reading weights, arithmetic), so there is a fit for
    every fourfold of tokens. ``observed`` and ``level`` are float64 [layers]: modelled seconds under the observed and
    the balanced load, added up over recent steps.
    """

    def __init__(self, layers: int) -> None:
        self._fits: dict[int, _Fit] = {}
        self._steps = 0
        self._errors: deque[float] = deque(maxlen=_KEPT_ERRORS)
        self.observed = np.zeros(layers)
        self.level = np.zeros(layers)

    def add(self, counts: NDArray[np.int64], seconds: NDArray[np.float64]) -> None:
        """One sampled step: ``counts`` [layers, experts], ``seconds`` [layers] of the experts stage."""
        x, y = features(counts), np.asarray(seconds, dtype=np.float64)
        good = np.isfinite(y) & (y > 0) & (counts.sum(axis=1) > 0)
        if not good.any():
            return
        size = int(np.log2(counts.sum(axis=1)[good].mean())) // 2
        fit = self._fits.setdefault(size, _Fit())
        self._steps += 1
        held_out = self._steps % HOLD_OUT == 0
        if fit.steps >= LEAST_STEPS:
            coefficients = fit.coefficients()
            ours = x @ coefficients
            if held_out:
                self._errors.append(float(np.median(np.abs(ours[good] / y[good] - 1))))
            even = features(balanced(counts))
            theirs = even @ coefficients
            usable = good & fit.known(even) & (ours > 0) & (theirs > 0)
            self.observed = self.observed * _FADE + np.where(usable, ours, 0)
            self.level = self.level * _FADE + np.where(usable, theirs, 0)
        if not held_out:
            fit.add(x[good], y[good])

    @property
    def error(self) -> float:
        """Median relative error on held-out steps; NaN before there are ten."""
        return float(np.median(self._errors)) if len(self._errors) >= 10 else float("nan")
