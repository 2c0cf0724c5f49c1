"""The settings about telemetry that every service has."""

from __future__ import annotations

from dataclasses import dataclass

from longreach.config import setting


@dataclass(frozen=True)
class TelemetrySettings:
    """Where a service's metrics go; with nothing set, nothing is measured."""

    metrics_listen: str = setting(
        "",
        "host:port that serves metrics to Prometheus, at /metrics in plain HTTP; empty for none",
    )
    otlp_endpoint: str = setting(
        "",
        "OTLP/gRPC endpoint of a collector that metrics are sent to, such as "
        "http://collector:4317, or https:// for TLS; the standard OTEL_* variables say the rest; "
        "empty for none",
    )
