"""Do two runs route differently, or is it sampling noise? Three answers for three kinds of data.

:func:`compare` shuffles blocks of text (sequences): right when tokens of one text resemble each other, as they do.
:func:`compare_counts` has only totals and must take tokens as independent, so that it sees differences too easily.
:func:`compare_choices` has the same tokens in both runs (one text; two models or quantisations) and looks at each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_monitor.analysis.records import Record

DIFFERENT = "different"
ALIKE = "no difference beyond sampling noise"
UNKNOWN = "too little data to tell"

Floats = NDArray[np.float64]


def js_bits(a: Any, b: Any) -> Floats:
    """Jensen-Shannon divergence of two loads in bits, over the last axis: 0 equal, 1 disjoint. NaN without tokens."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = x / x.sum(axis=-1, keepdims=True), y / y.sum(axis=-1, keepdims=True)
        m = (x + y) / 2
        kl = [np.where(s > 0, s * np.log2(s / m), 0.0 * s).sum(axis=-1) for s in (x, y)]
    return np.asarray(np.maximum((kl[0] + kl[1]) / 2, 0.0))


def js_floor_bits(tokens_a: float, tokens_b: float, experts: int, top_k: int) -> float:
    """Expected :func:`js_bits` of two samples of independent tokens that are routed alike.

    To second order JS = 1/(8 ln 2) * sum (a-b)^2/m; a share c/(N k) of an expert that a token chooses with
    probability p has variance p(1-p)/(N k^2), and the p add up to k: (1/N_a + 1/N_b) (experts - k) / (8 k ln 2).
    """
    return (1 / tokens_a + 1 / tokens_b) * (experts - top_k) / (8 * top_k * math.log(2))


@dataclass(frozen=True)
class LayerComparison:
    """One layer. ``js_bits`` divergence, ``floor_bits`` what sampling noise alone would show, ``p_value`` corrected for
    all layers (NaN: not tested), ``verdict`` one of the constants above, ``changed`` experts whose share of tokens
    changed most: (expert, share of a's load, share of b's load)."""

    layer: int
    js_bits: float
    floor_bits: float
    p_value: float
    verdict: str
    changed: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True)
class Comparison:
    """Two runs. ``method`` says what was tested and under which assumption."""

    layers: tuple[LayerComparison, ...]
    alpha: float
    method: str

    @property
    def verdict(self) -> str:
        """Over all layers: different if any is (its p-value is corrected for their number)."""
        found = {layer.verdict for layer in self.layers}
        return DIFFERENT if DIFFERENT in found else ALIKE if ALIKE in found else UNKNOWN

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: -1.0 if math.isnan(layer.js_bits) else layer.js_bits)
        number = sum(layer.verdict == DIFFERENT for layer in self.layers)
        return (
            f"{self.verdict}: {number} of {len(self.layers)} layers differ at {self.alpha:g}; "
            f"largest divergence {worst.js_bits:.4g} bits in layer {worst.layer}, "
            f"where sampling noise alone shows {worst.floor_bits:.2g}. {self.method}"
        )

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per layer, for tables."""
        return [
            {
                "layer": x.layer,
                "js_bits": x.js_bits,
                "floor_bits": x.floor_bits,
                "p_value": x.p_value,
                "verdict": x.verdict,
                "most_changed_expert": x.changed[0][0] if x.changed else None,
            }
            for x in self.layers
        ]


def _changed(a: NDArray[Any], b: NDArray[Any], top: int = 5) -> tuple[tuple[int, float, float], ...]:
    shares = a / max(float(a.sum()), 1.0), b / max(float(b.sum()), 1.0)
    order = np.argsort(-np.abs(shares[0] - shares[1]), kind="stable")[:top]
    return tuple((int(e), float(shares[0][e]), float(shares[1][e])) for e in order)


def compare_counts(
    a: Any, b: Any, tokens_a: int, tokens_b: int, *, alpha: float = 0.01, layers: Any = None
) -> Comparison:
    """Compare totals [layers, experts] of ``tokens_a`` and ``tokens_b`` tokens, taken as independent.

    Per expert the two-sided two-proportion z-test; a layer's p-value is its smallest, times layers * experts
    (Bonferroni, which holds however the experts depend on each other). Experts expected to be chosen, or passed over,
    fewer than 5 times in a run are not tested; where none is left, the verdict is UNKNOWN.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"both need one shape [layers, experts], got {x.shape} and {y.shape}")
    if min(tokens_a, tokens_b) < 1:
        raise ValueError("both runs need tokens")
    if (x > tokens_a).any() or (y > tokens_b).any():
        raise ValueError("an expert cannot have been chosen by more tokens than there are")
    pooled = (x + y) / (tokens_a + tokens_b)
    spread = np.sqrt(pooled * (1 - pooled) * (1 / tokens_a + 1 / tokens_b))
    testable = np.minimum(pooled, 1 - pooled) * min(tokens_a, tokens_b) >= 5
    z = np.where(testable, np.abs(x / tokens_a - y / tokens_b) / np.where(spread > 0, spread, 1), 0.0)
    result = []
    for i in range(len(x)):
        p = min(1.0, math.erfc(float(z[i].max()) / math.sqrt(2)) * x.size) if testable[i].any() else math.nan
        top_k = max(1, round(float(x[i].sum() / tokens_a)))
        result.append(
            LayerComparison(
                layer=i if layers is None else int(layers[i]),
                js_bits=float(js_bits(x[i], y[i])),
                floor_bits=js_floor_bits(tokens_a, tokens_b, x.shape[1], top_k),
                p_value=p,
                verdict=UNKNOWN if math.isnan(p) else DIFFERENT if p < alpha else ALIKE,
                changed=_changed(x[i], y[i]),
            )
        )
    return Comparison(
        tuple(result), alpha, "Tokens are taken as independent; texts are not, so small p-values flatter."
    )


def compare(
    a: Record | Any,
    b: Record | Any,
    *,
    alpha: float = 0.01,
    permutations: int = 1999,
    seed: int = 0,
    layers: Any = None,
) -> Comparison:
    """Compare records, or counts by block [blocks, layers, experts], by shuffling blocks between the runs.

    If both runs route alike, it does not matter which run a block came from. Statistic per layer: divergence of the
    summed loads in standard deviations of its shuffled values; p-values against the largest over layers
    (Westfall-Young), so that they hold for all layers at once. UNKNOWN where no shuffling could reach ``alpha``.
    """
    if isinstance(a, Record) and isinstance(b, Record):
        if a.layers != b.layers:
            raise ValueError(f"the runs have different layers: {a.layers} and {b.layers}")
        layers = a.layers
    x = np.asarray(a.blocks() if isinstance(a, Record) else a, dtype=np.float64)
    y = np.asarray(b.blocks() if isinstance(b, Record) else b, dtype=np.float64)
    if x.ndim != 3 or x.shape[1:] != y.shape[1:]:
        raise ValueError(f"both need shapes [blocks, layers, experts] with equal ends, got {x.shape} and {y.shape}")
    n, total = len(x), len(x) + len(y)
    blocks = np.concatenate([x, y])
    whole = blocks.sum(axis=0)
    observed = js_bits(x.sum(axis=0), y.sum(axis=0))
    generator = np.random.default_rng(seed)
    shuffled = np.empty((permutations, blocks.shape[1]))
    for start in range(0, permutations, 256):
        number = min(256, permutations - start)
        mine = np.argsort(generator.random((number, total)), axis=1) < n
        part = np.tensordot(mine.astype(np.float64), blocks, axes=1)
        shuffled[start : start + number] = js_bits(part, whole - part)
    mean, std = shuffled.mean(axis=0), shuffled.std(axis=0)
    scale = np.where(std > 0, std, np.inf)
    highest = ((shuffled - mean) / scale).max(axis=1)
    score = (observed - mean) / scale
    p_values = [(1 + int((highest >= s - 1e-12).sum())) / (1 + permutations) for s in score]
    enough = math.comb(total, n) * alpha >= 2 and (permutations + 1) * alpha >= 1
    result = []
    for i, p in enumerate(p_values):
        sums = x[:, i].sum(axis=0), y[:, i].sum(axis=0)
        verdict = UNKNOWN if not enough or whole[i].sum() == 0 else DIFFERENT if p < alpha else ALIKE
        result.append(
            LayerComparison(
                layer=i if layers is None else int(layers[i]),
                js_bits=float(observed[i]),
                floor_bits=float(mean[i]),
                p_value=p if enough else math.nan,
                verdict=verdict,
                changed=_changed(*sums),
            )
        )
    return Comparison(
        tuple(result), alpha, f"{n} and {len(y)} blocks of text, {permutations} shufflings; tokens may be dependent."
    )


@dataclass(frozen=True)
class Agreement:
    """The same tokens in two runs, per layer. ``overlap`` mean share of a token's experts that both runs chose, with
    a 95 % interval ``low``..``high`` from resampling sequences; ``identical`` share of tokens with the same set of
    experts; ``first`` share with the same likeliest expert; ``chance`` overlap of uniform routing (k/experts)."""

    layers: tuple[int, ...]
    overlap: Floats
    low: Floats
    high: Floats
    identical: Floats
    first: Floats
    chance: float

    def __str__(self) -> str:
        if (self.identical == 1).all():
            return "the same experts for every token in every layer"
        worst = int(self.overlap.argmin())
        return (
            f"experts agree to {self.overlap.mean():.1%} on average (chance {self.chance:.1%}); least in layer "
            f"{self.layers[worst]}: {self.overlap[worst]:.1%} (95 % interval {self.low[worst]:.1%} to "
            f"{self.high[worst]:.1%}), {self.identical[worst]:.1%} of its tokens chose the same set"
        )


def compare_choices(a: Record, b: Record, *, resamples: int = 1000, seed: int = 0) -> Agreement:
    """Agreement of two runs over the same tokens in the same order (before and after quantisation, two checkpoints).

    Raises ValueError if tokens, layers or experts differ.
    """
    if a.layers != b.layers or a.experts != b.experts or not np.array_equal(a.token_ids, b.token_ids):
        raise ValueError("the two runs do not have the same tokens, layers and experts")
    x, y = a.chosen(), b.chosen()
    size = np.maximum(x.sum(axis=2), 1)
    share = (x & y).sum(axis=2) / size
    _, inverse = np.unique(a.sequence, return_inverse=True)
    inverse = inverse.reshape(-1)
    number = int(inverse.max()) + 1
    sums = np.stack([np.bincount(inverse, weights=row, minlength=number) for row in share])
    lengths = np.bincount(inverse, minlength=number).astype(np.float64)
    picks = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=resamples)
    means = (picks @ sums.T) / (picks @ lengths)[:, None]
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return Agreement(
        layers=a.layers,
        overlap=np.asarray(share.mean(axis=1)),
        low=np.asarray(low),
        high=np.asarray(high),
        identical=np.asarray((x == y).all(axis=2).mean(axis=1)),
        first=np.asarray((a.probabilities.argmax(axis=2) == b.probabilities.argmax(axis=2)).mean(axis=1)),
        chance=float(a.ids.shape[2] / a.experts),
    )
