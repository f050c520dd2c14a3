"""Seam: the API server's ``/metrics``.

Our text is appended to vLLM's answer by a small ASGI wrapper, made on a thread of its own. Registering a collector
with prometheus_client instead would format our series on the event loop that streams tokens, and with several API
servers it would be absent, since each then serves a fresh registry.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import gzip
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs

from moe_monitor import settings
from moe_monitor.board import remove_boards_of
from moe_monitor.capture.vllm.plugin import SENTINEL, SERVER_VARIABLE
from moe_monitor.export.collector import MoeCollector

logger = logging.getLogger("vllm.moe_monitor")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

#: A scrape waits this long for our part at most; it is done in milliseconds unless the disk hangs.
SCRAPE_SECONDS = 5.0

_collector: MoeCollector | None = None


def collector() -> MoeCollector:
    """This process's collector, started at the first call."""
    global _collector
    if _collector is None:
        try:
            configured = settings.load()
        except settings.SettingsError:  # the worker says so; here the state must show as inactive
            configured = settings.load({})
        _collector = MoeCollector(
            configured.dir,
            server=os.environ.get(SERVER_VARIABLE),
            max_series=configured.max_series,
            gentle=True,
            logger=logger,
        )
        _collector.start()
        atexit.register(remove_boards_of, str(_collector.server), configured.dir)
    return _collector


def patch_loggers(module: ModuleType) -> None:
    """Hook for ``vllm.v1.metrics.loggers``: learn which engines this API server speaks for."""
    cls = module.PrometheusStatLogger
    original = cls.__init__
    if hasattr(original, SENTINEL):
        return

    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, engine_indexes: list[int] | None = None, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, engine_indexes, *args, **kwargs)
        try:
            name = vllm_config.model_config.served_model_name
            collector().expected = tuple((str(name), str(index)) for index in engine_indexes or [0])
        except Exception as error:
            logger.warning("moe-monitor: cannot tell which engines this server has: %r", error)

    setattr(init, SENTINEL, original)
    cls.__init__ = init


def patch_metrics(module: ModuleType) -> None:
    """Hook for ``vllm.entrypoints.serve.instrumentator.metrics``: append to what /metrics answers."""
    original = module.attach_router
    if hasattr(original, SENTINEL):
        return

    @functools.wraps(original)
    def attach_router(app: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(app, *args, **kwargs)
        try:
            app.add_middleware(MetricsMiddleware, collector=collector())
        except Exception as error:
            logger.warning("moe-monitor: its metrics are not on this server's /metrics: %r", error)
        return result

    setattr(attach_router, SENTINEL, original)
    module.attach_router = attach_router  # type: ignore[attr-defined]


class Worker:
    """One daemon thread that does work for an event loop, one thing after the other.

    Not a ThreadPoolExecutor: the interpreter waits at its exit for such threads, so a read that hangs would keep the
    server from ending.
    """

    def __init__(self, name: str, on_idle: Callable[[], None] = lambda: None) -> None:
        self._name = name
        self._on_idle = on_idle
        self._thread: threading.Thread | None = None
        self._queue: queue.SimpleQueue[tuple[Callable[[], bytes], asyncio.Future[bytes]]] = queue.SimpleQueue()
        #: Since when the present piece of work has been at it; infinite while there is none.
        self._since = math.inf

    def submit(self, work: Callable[[], bytes]) -> asyncio.Future[bytes]:
        """Call from the event loop. Raises TimeoutError at once while earlier work hangs."""
        if time.monotonic() - self._since > SCRAPE_SECONDS:
            raise TimeoutError("an earlier one still hangs")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._queue.put((work, future))
        return future

    def _run(self) -> None:
        while True:
            work, future = self._queue.get()
            if not future.done():  # otherwise whoever waited has given up
                self._do(work, future)
            del work, future  # an answer has megabytes
            if self._queue.empty():
                self._on_idle()

    def _do(self, work: Callable[[], bytes], future: asyncio.Future[bytes]) -> None:
        self._since = time.monotonic()
        # vLLM has just made its own part on the event loop; let the loop do what has come due meanwhile.
        time.sleep(0.001)
        result: bytes | Exception
        try:
            result = work()
        except Exception as error:
            result = error
        self._since = math.inf
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            future.get_loop().call_soon_threadsafe(_settle, future, result)


def _settle(future: asyncio.Future[bytes], result: bytes | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


class MetricsMiddleware:
    """Passes everything through and appends the monitor's exposition to a successful answer of ``GET /metrics``."""

    def __init__(self, app: App, collector: MoeCollector) -> None:
        self._app = app
        self._collector = collector
        self._work = Worker("moe-monitor-scrape", self._forget)
        self._missing = False
        #: What was rendered last, and when that began: scrapes that were waiting by then share it.
        self._last: dict[tuple[bool, tuple[str, ...] | None], tuple[float, bytes]] = {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].rstrip("/") != "/metrics" or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        names = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("name[]")
        headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"accept-encoding"]
        compress = any(k.lower() == b"accept-encoding" and b"gzip" in v for k, v in scope["headers"])
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self._app({**scope, "headers": headers}, receive, keep)
        if not messages or messages[0].get("status") != 200:
            for message in messages:
                await send(message)
            return
        start, body = messages[0], b"".join(m.get("body", b"") for m in messages[1:])
        openmetrics = any(k.lower() == b"content-type" and b"openmetrics" in v for k, v in start["headers"])
        try:
            call = functools.partial(self._extend, time.monotonic(), body, names, openmetrics, compress)
            body = await asyncio.wait_for(self._work.submit(call), SCRAPE_SECONDS)
            self._missing = False
        except Exception as error:
            if not self._missing:  # once, not at every scrape
                logger.warning("moe-monitor: its metrics are missing from answers of /metrics: %r", error)
            self._missing = True
            compress = False  # vLLM's own metrics, as they came
        kept = [(k, v) for k, v in start["headers"] if k.lower() not in (b"content-length", b"content-encoding")]
        kept.append((b"content-length", str(len(body)).encode()))
        if compress:
            kept.append((b"content-encoding", b"gzip"))
        await send({**start, "headers": kept})
        await send({"type": "http.response.body", "body": body})

    def _forget(self) -> None:
        """Nobody waits: what was rendered is of no more use."""
        self._last = {}

    def _extend(self, asked: float, body: bytes, names: list[str] | None, openmetrics: bool, compress: bool) -> bytes:
        wanted = (openmetrics, None if names is None else tuple(names))
        begun, ours = self._last.get(wanted, (-math.inf, b""))
        if begun < asked:
            begun = time.monotonic()
            ours = self._collector.render(openmetrics=openmetrics, names=names)
            self._last = {wanted: (begun, ours)}
        if openmetrics:
            body = body.removesuffix(b"# EOF\n")
        body += ours
        # Level 1: a scrape of megabytes every few seconds is worth little CPU and no more bytes than it must have.
        return gzip.compress(body, 1, mtime=0) if compress else body
