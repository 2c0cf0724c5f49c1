"""The settings about metrics, traces and logs that every service has."""

from __future__ import annotations

from dataclasses import dataclass

from longreach.config import setting


@dataclass(frozen=True)
class TelemetrySettings:
    """Where a service's metrics and traces go, and how it logs; by default nothing is measured."""

    metrics_listen: str = setting(
        "",
        "host:port that serves metrics to Prometheus, at /metrics in plain HTTP; empty for none",
    )
    log_format: str = setting(
        "text",
        "text, or json: one object per line, with the ids of the request, session and trace that "
        "it belongs to",
    )
    otlp_endpoint: str = setting(
        "",
        "OTLP/gRPC endpoint of a collector that metrics and traces are sent to, such as "
        "http://collector:4317, or https:// for TLS; the standard OTEL_* variables say the rest; "
        "empty for none",
    )
