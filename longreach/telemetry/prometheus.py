"""/metrics for Prometheus, over plain HTTP on a port of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from longreach.errors import Unavailable
from longreach.telemetry.instruments import Collected, Distribution, collect
from longreach.telemetry.names import Kind, Metric
from longreach.telemetry.spelling import prometheus_name

_Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class _Instruments(Collector):
    """What the process's instruments hold, as families of prometheus_client."""

    def collect(self) -> Iterable[_Family]:
        return [_family(each) for each in collect()]


class MetricsServer:
    """Serves /metrics until `stop`. Raises Unavailable where the address cannot be had."""

    def __init__(self, listen: str) -> None:
        host, _, port = listen.rpartition(":")
        registry = CollectorRegistry()
        registry.register(_Instruments())
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        try:
            self._server, self._thread = start_http_server(
                int(port), host.strip("[]") or "0.0.0.0", registry
            )
            self._server.set_app(_in_plain_text(self._server.get_app()))
        except (OSError, ValueError, OverflowError) as problem:
            raise Unavailable(
                f"metrics cannot be served on {listen!r}: {problem}; give another --metrics-listen"
            ) from None
        self.address = f"{host or '0.0.0.0'}:{self._server.server_port}"

    def stop(self) -> None:
        """Serves no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _in_plain_text(app: Any) -> Any:
    """The exporter's WSGI application, which answers in the text format whatever is asked for.

    Asked for OpenMetrics without UTF-8 names, as Prometheus 2 does, prometheus_client writes
    underscores for the colons of names, which need no UTF-8.
    """

    def plain(environ: Mapping[str, Any], start_response: Any) -> Any:
        return app({**environ, "HTTP_ACCEPT": "text/plain"}, start_response)

    return plain


def label_names(metric: Metric) -> tuple[str, ...]:
    """The labels of a metric's series."""
    return ("engine", *metric.labels)


def _family(collected: Collected) -> _Family:
    metric = collected.metric
    names = label_names(metric)
    kinds: dict[Kind, type[_Family]] = {
        Kind.GAUGE: GaugeMetricFamily,
        Kind.COUNTER: CounterMetricFamily,
        Kind.HISTOGRAM: HistogramMetricFamily,
    }
    family = kinds[metric.kind](prometheus_name(metric), metric.help, labels=names)
    for labels, value in collected.series:
        values = [labels.get(name, "") for name in names]
        if isinstance(value, Distribution):
            bounds = [*map(_bound, metric.bounds), "+Inf"]
            buckets = list(zip(bounds, accumulate(value.counts), strict=True))
            assert isinstance(family, HistogramMetricFamily)
            family.add_metric(values, buckets=buckets, sum_value=value.sum)
        else:
            assert not isinstance(family, HistogramMetricFamily)
            family.add_metric(values, value)
    return family


def _bound(bound: float) -> str:
    return repr(float(bound))
