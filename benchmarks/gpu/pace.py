"""How fast the processor is, told by the thread that runs the model, in each pass: the time of a loop that touches
nothing. For ``in_place.py``.

Virtual machines share their processors: the same loop takes longer in one second than in another, and with it all that
the host does in a pass. Two measurements of one thing differ by some percent for that alone. The loop runs before a
pass, in front of all hooks, so it knows nothing of the monitor.

``put`` and ``take`` run in a worker (``LLM.collective_rpc``), the former after switching.switch.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any


def _loop(times: int) -> float:
    left, start = times, time.perf_counter()
    while left:
        left -= 1
    return time.perf_counter() - start


def put(worker: Any) -> None:
    """Begin to look."""
    runner, found = worker.model_runner, []
    original, own = runner.execute_model, runner.__dict__.get("execute_model")

    @functools.wraps(original)
    def paced(*args: Any, **kwargs: Any) -> Any:
        _loop(100)  # so that what it runs is in the caches
        found.append(_loop(400))
        return original(*args, **kwargs)

    runner.execute_model = paced
    worker._pace = found, own


def take(worker: Any) -> float:
    """End it. Microseconds of the loop: the mean, without the slowest twentieth, in which something else ran."""
    found, own = worker._pace
    if own is None:
        del worker.model_runner.execute_model
    else:
        worker.model_runner.execute_model = own
    found.sort()
    return 1e6 * statistics.fmean(found[: len(found) - len(found) // 20])
