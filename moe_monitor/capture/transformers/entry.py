"""The functions that users call: a monitor for a model, and the counts of given sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moe_monitor.capture.transformers.session import Monitor


def monitor(
    model: nn.Module,
    *,
    layers: Sequence[int] | None = None,
    latency: bool = True,
    record: bool = False,
    record_limit: int = 2 << 30,
    skip_token_ids: Iterable[int] = (),
    model_name: str | None = None,
) -> Monitor:
    """A monitor for a transformers mixture-of-experts model; use ``with``, or ``start`` and ``stop``.

    layers: indices of the MoE layers to watch; None all. latency: time router, experts and block of each layer
    (eager passes only; compiled code cannot be timed from outside). record: keep every token's probabilities and
    choices on the host, up to ``record_limit`` bytes, for exact quantiles and for analyses. skip_token_ids: input
    tokens that are not counted, for example the padding that ``generate`` feeds for sequences that have ended, which
    its attention mask shows as real. Padding by attention mask is never counted.

    Raises UnsupportedModelError (a ValueError) for models that cannot be monitored. A failure during a pass switches
    the monitor off (:attr:`Monitor.off`, one log message) and leaves the model running.
    """
    return Monitor(
        model,
        layers=layers,
        latency=latency,
        record=record,
        record_limit=record_limit,
        skip_token_ids=skip_token_ids,
        model_name=model_name,
    )


def expert_counts(model: nn.Module, sequences: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    """Tokens per [layer, expert] when each token id sequence is run through the model by itself, without padding.

    All tokens of a sequence are counted, also its last. For comparison with another engine's counts.
    """
    device = next(p.device for p in model.parameters() if p.device.type != "meta")
    with monitor(model, latency=False) as m, torch.inference_mode():
        for sequence in sequences:
            model(input_ids=torch.tensor([list(sequence)], dtype=torch.long, device=device), use_cache=False)
    if m.off:
        raise RuntimeError(m.reason)
    return m.snapshot().counts
