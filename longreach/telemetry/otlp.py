"""Metrics and spans to an OTLP/gRPC collector.

The standard variables of OpenTelemetry hold: OTEL_METRIC_EXPORT_INTERVAL and
OTEL_BSP_SCHEDULE_DELAY (milliseconds), OTEL_EXPORTER_OTLP_HEADERS, _CERTIFICATE, _CLIENT_KEY,
_TIMEOUT and so on, OTEL_RESOURCE_ATTRIBUTES.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import export as otel
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

import longreach
from longreach.telemetry.instruments import Collected, Distribution, collect
from longreach.telemetry.names import Kind
from longreach.telemetry.spelling import otlp_name

STOP_TIMEOUT_S = 2.0
"""How long the last export may take when the service stops."""

_INTERVAL_MS = "60000"
_CUMULATIVE = otel.AggregationTemporality.CUMULATIVE
_log = logging.getLogger(__name__)


def resource(service: str, engine: str) -> Resource:
    """Who sends: the service and its own id; OTEL_RESOURCE_ATTRIBUTES adds to it."""
    return Resource.create(
        {
            "service.name": f"longreach-{service}",
            "service.namespace": "longreach",
            "service.instance.id": engine,
            "service.version": longreach.__version__,
        }
    )


class MetricsPush:
    """Sends every metric every OTEL_METRIC_EXPORT_INTERVAL, and once more at the end."""

    def __init__(self, endpoint: str, sender: Resource) -> None:
        self._exporter = OTLPMetricExporter(endpoint=endpoint)
        self._resource = sender
        self._began_ns = time.time_ns()
        self._interval_s = int(os.environ.get("OTEL_METRIC_EXPORT_INTERVAL", _INTERVAL_MS)) / 1e3
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Sends what there is and ends, also when nobody listens."""
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT_S)
        self._exporter.shutdown(timeout_millis=STOP_TIMEOUT_S * 1e3)

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stopping.wait(self._interval_s)
            try:
                self._exporter.export(metrics_data(self._resource, self._began_ns))
            except Exception:
                _log.exception("metrics were not sent")


class SpansPush:
    """Sends spans in batches. `share` of the requests that come without a trace context of their
    own are sampled; a context that came along decides for the others."""

    def __init__(self, endpoint: str, sender: Resource, share: float) -> None:
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(share)),
            resource=sender,
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self.tracer = self._provider.get_tracer("longreach", longreach.__version__)

    def stop(self) -> None:
        """Sends what there is and ends, also when nobody listens."""
        ending = threading.Thread(target=self._provider.shutdown, name="otlp-spans", daemon=True)
        ending.start()
        ending.join(STOP_TIMEOUT_S)


def metrics_data(sender: Resource, began_ns: int) -> otel.MetricsData:
    """Every metric as OpenTelemetry's data model has it; sums run since `began_ns`."""
    now_ns = time.time_ns()
    metrics = [_metric(each, began_ns, now_ns) for each in collect()]
    scope = InstrumentationScope("longreach", longreach.__version__)
    return otel.MetricsData(
        [otel.ResourceMetrics(sender, [otel.ScopeMetrics(scope, metrics, "")], "")]
    )


def _metric(collected: Collected, began_ns: int, now_ns: int) -> otel.Metric:
    metric = collected.metric
    data: Any
    if metric.kind is Kind.HISTOGRAM:
        points = [
            otel.HistogramDataPoint(
                attributes=labels,
                start_time_unix_nano=began_ns,
                time_unix_nano=now_ns,
                count=sum(value.counts),
                sum=value.sum,
                bucket_counts=value.counts,
                explicit_bounds=metric.bounds,
                min=None,  # type: ignore[arg-type]  # over the whole life of the process: of no use
                max=None,  # type: ignore[arg-type]
            )
            for labels, value in collected.series
            if isinstance(value, Distribution)
        ]
        data = otel.Histogram(points, _CUMULATIVE)
    else:
        numbers = [
            otel.NumberDataPoint(labels, began_ns, now_ns, value)
            for labels, value in collected.series
            if not isinstance(value, Distribution)
        ]
        counts = metric.kind is Kind.COUNTER
        data = otel.Sum(numbers, _CUMULATIVE, True) if counts else otel.Gauge(numbers)
    return otel.Metric(otlp_name(metric), metric.help, metric.unit, data)
