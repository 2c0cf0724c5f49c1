"""Metrics of the services (docs/metrics.md): instruments that are cheap, exported to Prometheus and
to OTLP collectors. Off, they count nothing and import no exporter."""

from longreach.telemetry.instruments import counter, gauge, histogram, measuring
from longreach.telemetry.settings import TelemetrySettings

__all__ = ["TelemetrySettings", "counter", "gauge", "histogram", "measuring"]
