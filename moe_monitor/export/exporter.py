"""Stand-alone HTTP exporter: the whole matrices of every server on a machine, from a process of its own.

Runs where vLLM does not have to be installed, and goes on answering while a vLLM server hangs. One per node, as with
dcgm-exporter. ``/metrics`` in Prometheus text or OpenMetrics, ``/requests`` with the last traced requests as JSON
(``?limit=N``), ``/-/healthy``, and a small page at ``/``. Everybody who reaches the port may read all of it, unless a
web configuration asks for TLS and passwords (:mod:`moe_monitor.export.webconfig`).
"""

from __future__ import annotations

import contextlib
import errno
import html
import itertools
import json
import logging
import os
import socket
import struct
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs

from moe_monitor import __version__
from moe_monitor.export.collector import MoeCollector
from moe_monitor.export.exposition import OPENMETRICS, TEXT
from moe_monitor.export.renderings import RenderingError, Renderings
from moe_monitor.export.requests import FleetLoad, as_json, recent
from moe_monitor.export.webconfig import WebConfig

logger = logging.getLogger(__name__)

#: Below this many bytes compression saves less than it costs.
_GZIP_FROM = 1024

_PLAIN = "text/plain; charset=utf-8"
#: What is compressed at a time, in bytes, and how many such parts may be under way.
_PART, _PACKED_AHEAD = 1 << 20, 32
#: Deflate, no name, no time, fastest, of an unknown system.
_GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\x04\xff"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>moe-monitor exporter</title>
<style>body{{font:16px/1.5 sans-serif;max-width:44em;margin:3em auto}}</style></head>
<body><h1>moe-monitor exporter</h1>
<p>Version {version}. <a href="metrics">Metrics</a> · <a href="requests?limit=20">Traced requests</a> ·
<a href="-/healthy">Health</a></p>
<p>Boards are read from <code>{directory}</code>.</p>
<h2>Monitored engines</h2>
{engines}
</body></html>
"""


class ExporterError(Exception):
    """The exporter cannot listen; the message says why and what to do."""


def preferences(header: str) -> dict[str, float]:
    """An Accept or Accept-Encoding header as value -> q; parameters other than q are dropped, bad q counts 0."""
    result: dict[str, float] = {}
    for part in header.lower().split(","):
        value, *parameters = (piece.strip() for piece in part.split(";"))
        q = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                try:
                    q = float(parameter[2:])
                except ValueError:
                    q = 0.0
        if value:
            result[value] = max(q, result.get(value, 0.0))
    return result


def wants_openmetrics(accept: str) -> bool:
    """Whether the client prefers OpenMetrics to the Prometheus text format, as Prometheus itself does."""
    wanted = preferences(accept)
    openmetrics = wanted.get("application/openmetrics-text", 0.0)
    return openmetrics > 0 and openmetrics >= wanted.get("text/plain", 0.0)


def accepts_gzip(accept_encoding: str) -> bool:
    wanted = preferences(accept_encoding)
    return wanted.get("gzip", wanted.get("*", 0.0)) > 0


def _first(parts: Iterable[bytes], size: int) -> tuple[bytes, Iterator[bytes]]:
    """At least ``size`` bytes of the beginning, if there are so many, and the rest."""
    rest, begin = iter(parts), b""
    while len(begin) < size and (part := next(rest, None)) is not None:
        begin += part
    return begin, rest


def _pieces(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces that are worth packing by themselves, and not so large that packing one takes long."""
    held: list[bytes] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size >= _PART:
            whole = b"".join(held)
            yield from (whole[i : i + _PART] for i in range(0, len(whole), _PART))
            held, size = [], 0
    if held:
        yield b"".join(held)


def _deflate(part: bytes, last: bool) -> bytes:
    """Deflated data that further parts may follow, unless it is the ``last``."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(part) + packer.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)


class _Handler(BaseHTTPRequestHandler):
    server: Exporter
    protocol_version = "HTTP/1.1"
    server_version = f"moe-monitor/{__version__}"
    sys_version = ""
    #: Seconds until a connection without a request is closed, so that idle clients do not hold threads for ever.
    timeout = 30

    def do_GET(self) -> None:
        web = self.server.web
        if web is not None and not web.allows(self.headers.get("Authorization", "")):
            self._reply([b"Unauthorized\n"], _PLAIN, HTTPStatus.UNAUTHORIZED)
            return
        path, _, query = self.path.partition("?")
        if path == "/metrics":
            self._metrics()
        elif path == "/requests":
            self._reply([self.server.requests(query)], "application/json", compressible=True)
        elif path == "/-/healthy":
            self._reply([b"ok\n"], _PLAIN)
        elif path == "/":
            self._reply([self.server.page().encode()], "text/html; charset=utf-8")
        else:
            self._reply([b"not found; metrics are at /metrics\n"], _PLAIN, HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET  # noqa: N815  (http.server looks methods up by this name)

    def _metrics(self) -> None:
        openmetrics = wants_openmetrics(",".join(self.headers.get_all("Accept", [])))
        try:
            parts = itertools.chain.from_iterable(self.server.renderings.ask(openmetrics))
            self._reply(parts, OPENMETRICS if openmetrics else TEXT, compressible=True)
            self.server.hangs = False
        except RenderingError as error:
            if error.__cause__ is None and not self.server.hangs:  # what has a cause was said when it happened
                logger.warning("moe-monitor: %s", error)
                self.server.hangs = True
            self._reply([f"{error}\n".encode()], _PLAIN, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _reply(
        self,
        parts: Iterable[bytes],
        content_type: str,
        status: HTTPStatus = HTTPStatus.OK,
        *,
        compressible: bool = False,
    ) -> None:
        """Packs ``parts`` as they come, and answers when there are all: nobody takes a part for the whole."""
        headers = [("Content-Type", content_type)]
        if status == HTTPStatus.UNAUTHORIZED:
            headers.append(("WWW-Authenticate", "Basic"))
        if compressible:
            headers.append(("Vary", "Accept, Accept-Encoding"))
            begin, parts = _first(parts, _GZIP_FROM)
            parts = itertools.chain((begin,), parts)
            if len(begin) >= _GZIP_FROM and accepts_gzip(",".join(self.headers.get_all("Accept-Encoding", []))):
                headers.append(("Content-Encoding", "gzip"))
                parts = self.server.packed(parts)
        body = b"".join(parts)
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class's name for it)
        logger.debug("%s %s", self.address_string(), format % args)


class Exporter(ThreadingHTTPServer):
    """The HTTP server. ``port`` 0 takes any free one; :attr:`url` tells which. Raises ExporterError.

    web: who may look, and over what; None for everybody, over plain HTTP.
    """

    daemon_threads = True
    #: Scrapes that arrive together wait their turn instead of being refused.
    request_queue_size = 64

    def __init__(self, collector: MoeCollector, host: str, port: int, web: WebConfig | None = None) -> None:
        self.collector = collector
        self.web = web
        self._packers = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="moe-monitor-gzip")
        #: Whether it was said that reading hangs.
        self.hangs = False
        self.renderings = Renderings(lambda openmetrics: collector.stream(openmetrics=openmetrics))
        self._fleet = FleetLoad(collector)
        self._thread: threading.Thread | None = None
        if not 0 <= port <= 65535:
            raise ExporterError(f"{port} is not a port; a port is a number from 0 to 65535")
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self.address_family, *_, address = found[0]
            super().__init__(address[:2], _Handler)  # type: ignore[arg-type]  # getaddrinfo's union of address kinds
        except (OSError, UnicodeError) as error:
            raise ExporterError(_refusal(error, host, port)) from error

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks DNS for the host's name and may wait for that.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        scheme = "http" if self.web is None or self.web.tls is None else "https"
        return f"{scheme}://{host}:{self.server_port}"

    def finish_request(self, request: Any, client_address: Any) -> None:
        """In the connection's own thread, so that a slow handshake holds up nobody else."""
        tls = None if self.web is None else self.web.tls
        if tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(_Handler.timeout)
        with tls.wrap_socket(request, server_side=True) as secure:
            super().finish_request(secure, client_address)
            with contextlib.suppress(OSError):
                secure.unwrap()

    def packed(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        """One gzip member at the fastest level, packed side by side: zlib lets go of Python's lock."""
        packing: deque[Future[bytes]] = deque()
        crc = size = 0
        yield _GZIP_HEAD
        for piece in _pieces(parts):
            crc, size = zlib.crc32(piece, crc), size + len(piece)
            packing.append(self._packers.submit(_deflate, piece, False))
            while packing and (packing[0].done() or len(packing) > _PACKED_AHEAD):
                yield packing.popleft().result()
        while packing:
            yield packing.popleft().result()
        yield _deflate(b"", True) + struct.pack("<II", crc, size & 0xFFFFFFFF)

    def page(self) -> str:
        engines = self.collector.read()
        rows = "".join(
            f"<li>{html.escape(e.model_name)}, engine {html.escape(e.engine)}: "
            f"{'active' if e.status.active else 'not active: ' + html.escape(e.status.reason)}</li>"
            for e in engines
        )
        listed = f"<ul>{rows}</ul>" if rows else "<p>None is running.</p>"
        directory = html.escape(str(self.collector.directory))
        return _PAGE.format(version=__version__, directory=directory, engines=listed)

    def requests(self, query: str) -> bytes:
        """The last traced requests as JSON, newest first, at most ``limit`` of them."""
        wanted = parse_qs(query).get("limit", ["100"])[-1]
        limit = min(int(wanted), 1000) if wanted.isdecimal() and len(wanted) < 10 else 100
        return json.dumps(
            [as_json(s) for s in recent(self.collector.directory, self._fleet, limit, self.collector.server)]
        ).encode()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  (not our signature)
        # A client that went away is not worth a traceback. socketserver calls this inside its except block.
        logger.debug("request from %s failed", client_address, exc_info=True)  # noqa: LOG014

    def start(self) -> None:
        """Serve from a thread, and keep the trailing windows fed."""
        self.collector.start()
        thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="moe-monitor-exporter", daemon=True)
        thread.start()
        self._thread = thread  # only now: stopping waits for it

    def stop(self) -> None:
        """Stop serving and free the port. Safe to call twice."""
        if self._thread is not None:
            self.shutdown()
            self._thread.join(timeout=5)
            self._thread = None
        self.collector.stop()
        self.renderings.stop()
        with contextlib.suppress(OSError):
            self.server_close()
        self._packers.shutdown(wait=False, cancel_futures=True)


def _refusal(error: OSError | UnicodeError, host: str, port: int) -> str:
    elsewhere = "that is not an address of this machine; use 127.0.0.1, or 0.0.0.0 for all addresses"
    if isinstance(error, socket.gaierror | UnicodeError):
        return f"cannot listen on {host!r}: {elsewhere}"
    known = {
        errno.EADDRINUSE: "another program listens there; stop it or choose another port",
        errno.EADDRNOTAVAIL: elsewhere,
        errno.EACCES: "ports below 1024 need special rights; choose a higher port",
    }
    why = known.get(error.errno or 0, error.strerror or str(error))
    return f"cannot listen on {host or '*'}:{port}: {why}"
