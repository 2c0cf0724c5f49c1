"""An OTLP collector in this process: what arrived over real gRPC, for tests to look at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from opentelemetry.proto.collector.metrics.v1 import (
    metrics_service_pb2,
    metrics_service_pb2_grpc,
)
from opentelemetry.proto.metrics.v1 import metrics_pb2


class Collector(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps what it is sent. `endpoint` is its URL."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.metric_requests: list[metrics_service_pb2.ExportMetricsServiceRequest] = []
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


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that serves on a free port."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    collector.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
