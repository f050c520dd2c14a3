"""Families of what sampled steps took: layers by stage, whole passes, the MoE share, and what imbalance costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_monitor.catalog import BY_NAME, LAYER_KINDS, STAGES, STEP_KINDS
from moe_monitor.snapshot import EngineSnapshot

Labels = tuple[str, ...]


def latency(engine: EngineSnapshot, family: Any, max_series: int | None) -> Iterator[Any]:
    """Families of one engine; none before the first sampled step. ``family`` as in :mod:`families`.

    Where all stages would take more than ``max_series`` series, only whole layers are shown.
    """
    timed = engine.latency
    if timed is None:
        return
    a = timed.arrays
    kinds = [i for i in range(len(STEP_KINDS)) if a["step"][i].any()]
    if not kinds:
        return
    labels: list[Labels] = [(STEP_KINDS[i],) for i in kinds]
    yield family("moe_step_duration_seconds", labels, a["step"][kinds], a["step_ns"][kinds] / 1e9)
    yield family("moe_step_tokens", labels, a["tokens"][kinds], a["tokens_sum"][kinds])
    yield family("moe_step_moe_seconds_total", labels, a["moe_ns"][kinds] / 1e9)
    yield family("moe_step_timed_seconds_total", labels, a["timed_ns"][kinds] / 1e9)
    yield _layers(engine, family, max_series)
    flops = [
        ((str(layer), kind), int(a["flops"][i, k]))
        for i, layer in enumerate(timed.layers)
        for k, kind in enumerate(LAYER_KINDS)
        if a["flops"][i, k]
    ]
    yield family("moe_layer_sampled_flops_total", [f[0] for f in flops], [f[1] for f in flops])
    known = np.flatnonzero(np.isfinite(timed.cost))
    if known.size and timed.error == timed.error:
        yield family("moe_imbalance_cost_ratio", [(str(timed.layers[i]),) for i in known], timed.cost[known])
        yield family("moe_imbalance_cost_error_ratio", [()], [timed.error])
    if timed.experts_ns:
        ranks: list[Labels] = [(str(rank),) for rank in timed.experts_ns]
        seconds = [ns / 1e9 for ns in timed.experts_ns.values()]
        yield family("moe_ep_rank_experts_seconds_total", ranks, seconds)
    if timed.wait:
        waits: list[Labels] = [(str(rank),) for rank in timed.wait]
        yield family("moe_ep_straggler_wait_ratio", waits, list(timed.wait.values()))


def _layers(engine: EngineSnapshot, family: Any, max_series: int | None) -> Any:
    assert engine.latency is not None
    a = engine.latency.arrays
    stages = list(range(len(STAGES)))
    per_histogram = len(BY_NAME["moe_layer_duration_seconds"].buckets) + 3
    if max_series is not None and len(engine.latency.layers) * len(STAGES) * per_histogram > max_series:
        stages = [STAGES.index("layer")]
    series = [
        (i, s, k)
        for i in range(len(engine.latency.layers))
        for s in stages
        for k in range(len(LAYER_KINDS))
        if a["layer"][i, s, k].any()
    ]
    names: list[Labels] = [(str(engine.latency.layers[i]), STAGES[s], LAYER_KINDS[k]) for i, s, k in series]
    at = tuple(np.array(series, dtype=np.int64).reshape(-1, 3).T)
    return family("moe_layer_duration_seconds", names, a["layer"][at], a["layer_ns"][at] / 1e9)
