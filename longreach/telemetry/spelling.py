"""How the name of a metric is written where it is exported."""

from __future__ import annotations

from longreach.telemetry.names import Kind, Metric


def prometheus_name(metric: Metric) -> str:
    """On /metrics, in queries; a histogram's series end in _bucket, _sum and _count besides."""
    return f"longreach:{metric.name}{'_total' if metric.kind is Kind.COUNTER else ''}"


def otlp_name(metric: Metric) -> str:
    """On OTLP."""
    return f"longreach.{metric.name}"
