"""Drift against the baseline file that MOE_MONITOR_BASELINE names, and the limits that the alerts compare with.

The limits are made here rather than in alert expressions: they depend on how many tokens a window had and on how the
deployment varied when its baseline was recorded, and here they are tested.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from moe_monitor import baseline as baselines
from moe_monitor.baseline import BaselineError, Model
from moe_monitor.catalog import WINDOWS
from moe_monitor.export.windows import History
from moe_monitor.settings import SettingsError, load
from moe_monitor.snapshot import EngineSnapshot

logger = logging.getLogger(__name__)

#: How often the file is looked at again, so that a new recording counts without a restart. Seconds.
RECHECK = 10.0


class BaselineFile:
    """The baselines of a file, read again when it changes. Thread-safe; never raises."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._models: dict[str, Model] = {}
        self._stamp: tuple[int, ...] | None = None
        self._checked = -RECHECK
        self._said: set[str] = set()

    def model(self, engine: EngineSnapshot) -> Model | None:
        """The engine's baseline, None when there is none that fits."""
        if self.path is None:
            return None
        with self._lock:
            self._refresh()
            found = self._models.get(engine.model_name)
        if found is None:
            return None
        assert engine.layout is not None
        if (found.experts, found.layers, found.top_k) != (engine.layout.experts, engine.layers, engine.top_k):
            self._say(f"the baseline {str(self.path)!r} is of another {engine.model_name}: record it again")
            return None
        return found

    def failing(self, engine: EngineSnapshot) -> bool:
        """Whether a baseline was asked for and there is none to compare this engine with."""
        return self.path is not None and self.model(engine) is None

    def _refresh(self) -> None:
        assert self.path is not None
        if time.monotonic() - self._checked < RECHECK:
            return
        self._checked = time.monotonic()
        try:
            info = self.path.stat()
            stamp = (info.st_mtime_ns, info.st_size, info.st_ino)
            if stamp == self._stamp:
                return
            self._models, self._stamp = baselines.read(self.path), stamp
        except BaselineError as error:
            # A damaged file does not take back what an earlier, good one said.
            self._say(str(error))
        except OSError as error:
            self._say(f"cannot read the baseline {str(self.path)!r}: {error.strerror}")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("moe-monitor: %s", text)


@lru_cache(maxsize=1)
def configured() -> BaselineFile:
    """The file of this process's environment."""
    try:
        return BaselineFile(load().baseline)
    except SettingsError:
        return BaselineFile(None)  # said elsewhere; without settings the monitor is off


def drift(engine: EngineSnapshot, history: History, family: Any, file: BaselineFile | None = None) -> Iterator[Any]:
    """The families that need a baseline; none without one."""
    file = configured() if file is None else file
    model = file.model(engine)
    if model is None:
        if file.failing(engine):
            yield family("moe_baseline_usable", [()], [0])
        return
    yield family("moe_baseline_usable", [()], [1])
    yield family("moe_baseline_timestamp_seconds", [()], [model.recorded])
    layers = [(str(i),) for i in engine.layers]
    for metric, name in {
        "moe_baseline_drift_bits": "drift",
        "moe_baseline_imbalance_ratio": "imbalance",
        "moe_baseline_router_entropy_ratio": "entropy",
        "moe_baseline_selected_mass_ratio": "mass",
    }.items():
        yield family(metric, layers, getattr(model.statistics, name))
    yield from _windows(engine, history, family, model)


def _windows(engine: EngineSnapshot, history: History, family: Any, model: Model) -> Iterator[Any]:
    assert engine.layout is not None
    labels: list[tuple[str, ...]] = []
    columns: dict[str, list[float]] = {}
    for name, seconds in WINDOWS.items():
        rows = history.window(engine, seconds)
        counts, tokens = engine.layout.column(rows, "experts"), engine.layout.column(rows, "tokens")
        labels += [(str(layer), name) for layer in engine.layers]
        assignments = counts.sum(axis=-1)
        quiet = assignments == 0
        gauges = {
            "moe_routing_drift_bits": model.drift(counts),
            "moe_routing_drift_floor_bits": model.drift_floor(assignments),
            "moe_routing_drift_limit_bits": np.where(quiet, np.nan, model.drift_limit(assignments)),
            "moe_load_imbalance_limit_ratio": np.where(quiet, np.nan, model.imbalance_limit(tokens)),
            "moe_load_cv_limit_ratio": np.where(quiet, np.nan, model.cv_limit(tokens)),
            "moe_silent_experts": np.where(quiet, np.nan, model.silent(counts, tokens)),
        }
        for metric, values in gauges.items():
            columns.setdefault(metric, []).extend(np.asarray(values).tolist())
    for metric, known in columns.items():
        kept = [i for i, v in enumerate(known) if v == v]  # a window without tokens has no routing: no series
        yield family(metric, [labels[i] for i in kept], [known[i] for i in kept])


def ranks(engine: EngineSnapshot, placement: list[list[int]], file: BaselineFile | None = None) -> Any:
    """(normal, limit) of the imbalance of expert-parallel ranks, [layers] each, or None without a baseline."""
    model = (configured() if file is None else file).model(engine)
    return None if model is None else (model.rank_imbalance(placement), model.rank_imbalance_limit(placement))
