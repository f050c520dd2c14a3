"""A real OTLP receiver over gRPC that keeps the spans it is sent."""

from __future__ import annotations

import threading
import time
from concurrent import futures
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on a free loopback port. ``spans`` holds (time of arrival, span, attributes)."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, Any, dict[str, Any]]] = []
        self._lock = threading.Lock()
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        now = time.time()
        with self._lock:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self.spans += [(now, span, attributes(span.attributes)) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[tuple[float, Any, dict[str, Any]]]:
        with self._lock:
            return [entry for entry in self.spans if entry[1].name == name]

    def stop(self) -> None:
        self._server.stop(None).wait()


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    found = getattr(value, kind)
    return [_value(v) for v in found.values] if kind == "array_value" else found
