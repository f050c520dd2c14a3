"""Boards for tests: what a worker would have published, without a worker."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from moe_monitor import __version__
from moe_monitor.board import BoardWriter
from moe_monitor.latency import SEGMENT, latency_segment
from moe_monitor.layout import FIXED_POINT, HISTOGRAMS, RowLayout, edges
from moe_monitor.records import record_segments
from moe_monitor.snapshot import STATUS_SEGMENT, Status, routing_segment


def identity(
    layers: tuple[int, ...] = (0, 1, 2, 3), experts: int = 64, top_k: int = 8, **changes: Any
) -> dict[str, Any]:
    """What a vLLM worker says about itself; ``changes`` override single facts."""
    return {
        "version": __version__,
        "producer": "vllm",
        "producer_version": "0.32.0",
        "server": "server-1",
        "model_name": "tiny-olmoe",
        "engine": "0",
        "rank": {"tp": 0, "pp": 0, "dp": 0},
        "pid": os.getpid(),
        "layers": list(layers),
        "experts": experts,
        "top_k": top_k,
        "scoring": "softmax",
        "hidden_size": 64,
        "intermediate_size": 32,
        "matrices": 3,
        "started": time.time(),
    } | changes


def routed_rows(layers: int, experts: int, top_k: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Rows [layers, width] after ``tokens`` tokens in one pass, routed more skewed the deeper the layer.

    Every token is in one bucket of each histogram, and chooses ``top_k`` experts.
    """
    rng = np.random.default_rng(seed)
    layout = RowLayout(experts)
    rows = np.zeros((layers, layout.width), dtype=np.int64)
    values = {"entropy": 0.75, "top1": 0.125, "mass": 0.5, "per_token": top_k, "active": experts}
    for i, row in enumerate(rows):
        weight = rng.permutation(np.arange(1, experts + 1) ** (-0.2 * (i + 1.0)))
        # Chosen without replacement by the Gumbel trick
        keys = np.log(weight) + rng.gumbel(size=(tokens, experts))
        chosen = np.argsort(-keys, axis=1)[:, :top_k]
        row[layout.offsets["experts"]] = np.bincount(chosen.ravel(), minlength=experts)
        row[layout.at("tokens")] = tokens
        row[layout.at("passes")] = 1
        for name, (_, total) in HISTOGRAMS.items():
            n = 1 if name == "active" else tokens
            row[layout.offsets[name]][np.searchsorted(edges(name), values[name])] = n
            scale = FIXED_POINT if name in ("entropy", "top1", "mass") else 1
            row[layout.at(total)] = round(values[name] * scale * n)
    return rows


class FakeWorker:
    """A board on disk, held alive by this process. Use as a context manager.

    ``latency``: arrays of a :class:`~moe_monitor.latency.LatencyTable` of as many layers. ``traced``: with room for the
    records of traced requests, as a server has it by default.
    """

    def __init__(
        self,
        directory: Path,
        name: str = "rank-0",
        tokens: int = 1000,
        latency: dict[str, np.ndarray] | None = None,
        traced: bool = False,
        **facts: Any,
    ) -> None:
        self.facts = identity(**facts)
        self.layers, self.experts = len(self.facts["layers"]), self.facts["experts"]
        segments: dict[str, Any] = {"status": STATUS_SEGMENT}
        if traced:
            segments |= record_segments(self.layers, self.experts)
        if self.layers:
            segments["routing"] = routing_segment(self.layers, RowLayout(self.experts).width)
        if latency is not None:
            segments[SEGMENT] = latency_segment(self.layers)
        self.board = BoardWriter(directory, name, self.facts, segments)
        if latency is not None:
            self.board.write(SEGMENT, latency)
        self.now = Status(active=True, capture="eager", reason="")
        self.status(self.now)
        if self.layers:
            self.rows = routed_rows(self.layers, self.experts, self.facts["top_k"], tokens)
            self.publish(passes=1)

    def status(self, status: Status) -> None:
        self.now = status
        self.board.write("status", {"json": status.to_array()})

    def publish(self, passes: int) -> None:
        self.board.write("routing", {"rows": self.rows, "passes": np.array([passes])})
        self.status(self.now)

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.board.close()
