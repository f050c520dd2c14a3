"""Real OTLP receivers, over gRPC and HTTP, that keep the spans they are sent, or misbehave."""

from __future__ import annotations

import threading
import time
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class _Kept:
    """``spans`` holds (time of arrival, span, attributes)."""

    port: int

    def __init__(self) -> None:
        self.spans: list[tuple[float, Any, dict[str, Any]]] = []
        self._lock = threading.Lock()

    def _keep(self, request: Any) -> None:
        now = time.time()
        with self._lock:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self.spans += [(now, span, attributes(span.attributes)) for span in scope.spans]

    def named(self, name: str) -> list[tuple[float, Any, dict[str, Any]]]:
        with self._lock:
            return [entry for entry in self.spans if entry[1].name == name]


class Receiver(_Kept, trace_service_pb2_grpc.TraceServiceServicer):
    """Over gRPC, on a free loopback port. ``mood``: "kind", "refusing", "slow" (4 s for each call, then taken) or
    "hanging" (nothing is taken and no answer comes before the client has given up).
    """

    def __init__(self) -> None:
        super().__init__()
        self.mood = "kind"
        self.calls = 0
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listen, after :meth:`stop` on the same port again."""
        self._moved = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        self.calls += 1
        if self.mood == "refusing":
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "refused")
        if self.mood == "hanging":
            while context.is_active() and not self._moved.wait(0.1):
                pass
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "too late")
        if self.mood == "slow":
            self._moved.wait(4)
        self._keep(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def stop(self) -> None:
        self._moved.set()
        self._server.stop(None).wait()


class HttpReceiver(_Kept):
    """Over HTTP, at ``/v1/traces`` on a free loopback port."""

    def __init__(self) -> None:
        super().__init__()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver._keep(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
                answer = trace_service_pb2.ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    found = getattr(value, kind)
    return [_value(v) for v in found.values] if kind == "array_value" else found
