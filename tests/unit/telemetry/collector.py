"""An OTLP collector in this process: what arrived over real gRPC, for tests to look at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import (
    metrics_service_pb2,
    metrics_service_pb2_grpc,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.metrics.v1 import metrics_pb2


@dataclass(frozen=True)
class Span:
    """A span as it arrived; ids in hexadecimal."""

    service: str
    engine: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    start_ns: int
    end_ns: int
    failed: bool
    links: list[str]


class Collector(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps what it is sent. `endpoint` is its URL."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.metric_requests: list[metrics_service_pb2.ExportMetricsServiceRequest] = []
        self.spans: list[Span] = []
        self._news = threading.Condition()

    def Export(
        self,
        request: metrics_service_pb2.ExportMetricsServiceRequest,
        context: grpc.ServicerContext,
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        with self._news:
            self.metric_requests.append(request)
            self._news.notify_all()
        return metrics_service_pb2.ExportMetricsServiceResponse()

    def take_spans(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        with self._news:
            for each in request.resource_spans:
                sender = attributes(each.resource.attributes)
                self.spans += [
                    _span(sender, span) for inner in each.scope_spans for span in inner.spans
                ]
            self._news.notify_all()

    def wait(self, there: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Waits until something is there; fails when it does not come."""
        with self._news:
            assert self._news.wait_for(there, timeout_s), "the collector was not sent it"

    def metrics(self) -> dict[str, metrics_pb2.Metric]:
        """The metrics of the last export, by name."""
        return {
            metric.name: metric
            for resource in self.metric_requests[-1].resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self._collector.take_spans(request)
        return trace_service_pb2.ExportTraceServiceResponse()


def attributes(pairs: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)


def _span(sender: dict[str, Any], span: Any) -> Span:
    return Span(
        service=sender["service.name"],
        engine=sender["service.instance.id"],
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=attributes(span.attributes),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        failed=span.status.code == 2,
        links=[link.span_id.hex() for link in span.links],
    )


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that serves on a free port."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(collector, server)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Traces(collector), server)
    port = server.add_insecure_port("127.0.0.1:0")
    collector.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
