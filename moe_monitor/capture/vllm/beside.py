"""Seam: servers whose ``/metrics`` no Python answers (``vllm.v1.utils``, ``vllm.v1.engine.utils``, and the executor of
workers on several nodes).

vLLM's Rust front end is a program of its own, and a headless node has no front end. Engines and workers run Python all
the same, and publish their boards. So does the process that starts them, which has nothing to do while they run: there
an exporter can listen. Otherwise the log says where the metrics are.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from moe_monitor import settings
from moe_monitor.board import remove_boards_of
from moe_monitor.capture.vllm.identity import served_name
from moe_monitor.capture.vllm.plugin import SENTINEL, SERVER_VARIABLE, supervised

logger = logging.getLogger("vllm.moe_monitor")


_HEADLESS = "a headless node has no /metrics"

#: The engines that this process has started, as vLLM's own metrics name them.
_expected: tuple[tuple[str, str], ...] = ()
_done = False


def patch_utils(module: ModuleType) -> None:
    """Hook for ``vllm.v1.utils``: learn that the Rust front end is started."""
    _after_init(module.RustFrontendProcessManager, lambda _: _serve("vLLM's Rust front end answers /metrics"))


def patch_engines(module: ModuleType) -> None:
    """Hook for ``vllm.v1.engine.utils``: learn which engines are started, and whether for a front end elsewhere."""
    cls = module.CoreEngineProcManager
    parameters = inspect.signature(cls.__init__)
    if not {"local_engine_count", "start_index", "vllm_config", "local_client"} <= parameters.parameters.keys():
        raise TypeError(f"CoreEngineProcManager takes {', '.join(parameters.parameters)}")

    def started(arguments: dict[str, Any]) -> None:
        global _expected
        first, name = int(arguments["start_index"]), served_name(arguments["vllm_config"])
        _expected = tuple((name, str(first + i)) for i in range(int(arguments["local_engine_count"])))
        if not arguments["local_client"]:
            _serve(_HEADLESS)

    _after_init(cls, started)


def patch_workers(module: ModuleType) -> None:
    """Hook for ``vllm.v1.executor.multiproc_executor``: learn that a node has workers of an engine on another."""
    cls = module.MultiprocExecutor
    if "monitor_workers" not in inspect.signature(cls.__init__).parameters:
        raise TypeError("MultiprocExecutor does not take monitor_workers")

    def started(arguments: dict[str, Any]) -> None:
        if not arguments.get("monitor_workers", True):  # such a node watches them in its main thread
            _serve(_HEADLESS)

    _after_init(cls, started)


def _after_init(cls: Any, then: Callable[[dict[str, Any]], None]) -> None:
    original = cls.__init__
    if hasattr(original, SENTINEL):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        try:
            then(signature.bind(self, *args, **kwargs).arguments)
        except Exception as error:
            logger.warning("moe-monitor: if /metrics lacks its metrics, run `moe-monitor export`: %r", error)

    setattr(init, SENTINEL, original)
    cls.__init__ = init


def _serve(why: str) -> None:
    """Serve this server's metrics and tell of its requests, if that is wanted; otherwise say how to have them."""
    global _done
    if _done:
        return
    _done = True
    try:
        configured = settings.load()
    except settings.SettingsError:  # the worker says so
        return
    server = os.environ.get(SERVER_VARIABLE, str(os.getpid()))
    atexit.register(remove_boards_of, server, configured.dir)
    if configured.listen is None:
        logger.warning(
            "moe-monitor: %s, so its metrics are not there and requests have no spans of it. Set MOE_MONITOR_LISTEN, "
            "for example to 127.0.0.1:9101, and scrape that; or run `moe-monitor export` on this machine (boards: %s)",
            why,
            configured.dir,
        )
        return
    from moe_monitor.export.collector import MoeCollector
    from moe_monitor.export.exporter import Exporter, ExporterError
    from moe_monitor.export.frontend import FrontEnd
    from moe_monitor.export.requests import FleetLoad

    collector = MoeCollector(configured.dir, server=server, max_series=None, logger=logger)
    collector.expected = _expected
    host, port = configured.listen
    try:
        exporter = Exporter(collector, host, port + (supervised() or 0))
    except ExporterError as error:
        logger.warning("moe-monitor: %s, and its metrics are served nowhere: %s (MOE_MONITOR_LISTEN)", why, error)
        return
    atexit.register(exporter.stop)
    exporter.start()
    if configured.max_traced:
        front = FrontEnd(configured.dir, server, FleetLoad(collector), logger, told=False)
        front.start()
        atexit.register(front.close)
    logger.info("moe-monitor: %s; its metrics are at %s/metrics", why, exporter.url)
