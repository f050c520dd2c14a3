"""What the seams of both model runners share: attaching once, after the model is loaded."""

from __future__ import annotations

import atexit
import functools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moe_monitor import settings
from moe_monitor.capture.vllm.plugin import SENTINEL

if TYPE_CHECKING:
    from moe_monitor.capture.vllm.attach import Capture

logger = logging.getLogger("vllm.moe_monitor")


def patch_load_model(cls: type, patch_steps: Callable[[Any, Capture], None]) -> None:
    """Make ``cls.load_model`` attach the monitor when it is done; ``patch_steps`` hooks into the runner's steps."""
    original = cls.__dict__.get("load_model")
    if original is None or hasattr(original, SENTINEL):
        return

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        try:
            _attach(self, patch_steps)
        except Exception as error:
            logger.warning("moe-monitor could not attach, serving goes on without it: %r", error)
        return result

    setattr(load_model, SENTINEL, original)
    cls.load_model = load_model  # type: ignore[attr-defined]


def _attach(runner: Any, patch_steps: Callable[[Any, Capture], None]) -> None:
    if hasattr(runner, SENTINEL):
        return
    try:
        configured = settings.load()
    except settings.SettingsError as error:
        logger.warning("moe-monitor is off: %s", error)
        return
    from moe_monitor.capture.vllm.attach import Capture

    start = time.perf_counter()
    capture = Capture(runner, configured)
    capture.fuse.startup_seconds += time.perf_counter() - start
    setattr(runner, SENTINEL, capture)
    atexit.register(capture.close)
    if capture.fuse.blown or (capture.meter is None and capture.timing is None):
        return
    patch_steps(runner, capture)
    patch_dummies(runner, capture)


def patch_dummies(runner: Any, capture: Capture) -> None:
    """Passes that are not counted, and the capture of CUDA graphs; the same methods in both runners."""
    dummy_run, capture_model = runner._dummy_run, runner.capture_model

    @functools.wraps(dummy_run)
    def dummy(*args: Any, **kwargs: Any) -> Any:
        capture.begin_dummy()
        return dummy_run(*args, **kwargs)

    @functools.wraps(capture_model)
    def capture_graphs(*args: Any, **kwargs: Any) -> Any:
        if capture.fuse.blown:
            return capture_model(*args, **kwargs)
        from moe_monitor.capture.vllm import graphs

        capture.before_capture(runner.compilation_config)
        with graphs.capturing(capture):
            return capture_model(*args, **kwargs)

    runner._dummy_run = dummy
    runner.capture_model = capture_graphs
