"""The gauges of a worker (docs/metrics.md), read from its engine."""

from __future__ import annotations

from gpu_worker.engine import Engine
from longreach import telemetry


def observe(engine: Engine) -> None:
    """Has the gauges read from an engine."""
    telemetry.gauge("sessions_open").observe(lambda: engine.status().sessions)
    telemetry.gauge("resident_kv_bytes").observe(lambda: engine.status().resident_used_bytes)
    telemetry.gauge("prefills_running").observe(lambda: engine.prefills_running)
    telemetry.gauge("nodes_refused").observe(lambda: engine.nodes_refused)
