"""Traffic that routes as OLMoE really does: windows drawn from the published counts, and ways in which it breaks."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
from boards import FakeWorker

from moe_monitor.layout import FIXED_POINT, HISTOGRAMS, RowLayout, edges

TEXTS = ("c4", "github", "tulu", "wikipedia")
LAYERS = (0, 7, 15)
EXPERTS, TOP_K = 64, 8
LAYOUT = RowLayout(EXPERTS)

#: Tokens of a request. Tokens of one request are alike: each request has expert probabilities of its own, spread
#: around the text's as a Beta distribution of this weight would.
REQUEST, LIKENESS = 250, 40.0


def probabilities(text: str) -> np.ndarray:
    """[layers, experts]: how probable it is that a token takes an expert; rows add up to top-k."""
    folder = Path(__file__).parent / "data" / "olmoe_expert_counts"
    data = json.loads((folder / f"{text}.json").read_text())
    counts = np.array([data["counts_by_layer"][str(layer)] for layer in LAYERS], dtype=np.float64)
    return counts / counts.sum(axis=1, keepdims=True) * TOP_K


def collapsed(p: np.ndarray) -> np.ndarray:
    """Every token to one expert, the other choices anywhere."""
    broken = np.full_like(p, (TOP_K - 1) / (EXPERTS - 1))
    broken[:, 3] = 1.0
    return broken


def shifted(p: np.ndarray) -> np.ndarray:
    """Expert ids off by one."""
    return np.roll(p, 1, axis=1)


def dead(p: np.ndarray) -> np.ndarray:
    """The busiest expert of the last layer never chosen; others take its tokens."""
    broken = p.copy()
    broken[-1, broken[-1].argmax()] = 0
    broken[-1] *= TOP_K / broken[-1].sum()
    return np.minimum(broken, 1.0)


def draw(rng: np.random.Generator, p: np.ndarray, tokens: int) -> np.ndarray:
    """Counts [layers, experts] of ``tokens`` tokens in requests of alike ones."""
    requests = max(1, tokens // REQUEST)
    sizes = np.full(requests, tokens // requests)
    inside = np.clip(p, 1e-9, 1 - 1e-9)
    own = rng.beta(inside * LIKENESS, (1 - inside) * LIKENESS, size=(requests, *p.shape))
    own = np.where(p == 0, 0.0, np.where(p == 1, 1.0, own))
    return rng.binomial(sizes[:, None, None], own).sum(axis=0)


def rows(counts: np.ndarray, tokens: int, entropy: float = 0.8, mass: float = 0.45) -> np.ndarray:
    """Counter rows [layers, width] that a meter would have made of such a window."""
    made = np.zeros((len(LAYERS), LAYOUT.width), dtype=np.int64)
    made[:, LAYOUT.offsets["experts"]] = counts
    made[:, LAYOUT.at("tokens")] = tokens
    made[:, LAYOUT.at("passes")] = passes = max(1, tokens // 32)
    values = {"entropy": entropy, "top1": mass / 3, "mass": mass, "per_token": TOP_K, "active": EXPERTS * 0.9}
    for name, (_, total) in HISTOGRAMS.items():
        n = passes if name == "active" else tokens
        scale = FIXED_POINT if name in ("entropy", "top1", "mass") else 1
        made[:, LAYOUT.offsets[name].start + int(np.searchsorted(edges(name), values[name]))] = n
        made[:, LAYOUT.at(total)] = round(values[name] * scale * n)
    return made


def window(rng: np.random.Generator, text: str, tokens: int = 20_000) -> np.ndarray:
    return rows(draw(rng, probabilities(text), tokens), tokens)


class Traffic:
    """A worker that routes ``probabilities`` all the time, several windows a second."""

    def __init__(self, directory, text, **facts):
        self.worker = FakeWorker(directory, layers=LAYERS, experts=64, model_name="olmoe", **facts)
        self.p, self.entropy, self.mass = probabilities(text), 0.8, 0.45
        self.rng = np.random.default_rng(5)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.route)

    def route(self):
        passes = 1
        while not self.stopped.wait(0.02):
            passes += 100
            self.worker.rows = self.worker.rows + rows(draw(self.rng, self.p, 4000), 4000, self.entropy, self.mass)
            self.worker.publish(passes)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()
        self.worker.board.close()
