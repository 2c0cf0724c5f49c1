"""Telemetry of a service process, from its configuration: started once, stopped at the end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from longreach.logging import identify
from longreach.security.tls import TlsFiles
from longreach.telemetry import instruments, tracing
from longreach.telemetry.settings import TelemetrySettings

if TYPE_CHECKING:
    from longreach.telemetry.otlp import MetricsPush, SpansPush
    from longreach.telemetry.prometheus import MetricsServer

_log = logging.getLogger(__name__)


class Telemetry:
    """What a service exports: opened first of all, begun once the service knows who it is.

    Where the settings ask for nothing, nothing is measured and no exporter is imported. Raises
    Unavailable where the address of /metrics cannot be had.
    """

    def __init__(self, settings: TelemetrySettings) -> None:
        self._settings = settings
        self._server: MetricsServer | None = None
        self._push: MetricsPush | None = None
        self._spans: SpansPush | None = None
        if settings.metrics_listen:
            from longreach.telemetry.prometheus import MetricsServer

            self._server = MetricsServer(settings.metrics_listen)
            _log.info("metrics at http://%s/metrics", self._server.address)

    def begin(
        self,
        service: str,
        engine: str,
        *,
        model_name: str = "",
        files: TlsFiles | None = None,
        trace_sample_share: float = 0.0,
    ) -> None:
        """Begins to measure and, with a collector, to trace.

        service: "coordinator", "worker" or "node". engine: the service's own id. model_name: where
        it serves one model. files: whose certificate's end is exported. trace_sample_share: of the
        requests that begin here; work that comes with a sampled context is traced in any case.
        """
        identify(engine)
        endpoint = self._settings.otlp_endpoint
        if self._server is None and not endpoint:
            return
        labels = {"engine": engine, **({"model_name": model_name} if model_name else {})}
        instruments.switch_on(service, labels)
        if files is not None and files.identity is not None:
            instruments.gauge("certificate_not_after_seconds").observe(files.not_after_s)
        if endpoint:
            from longreach.telemetry.otlp import MetricsPush, SpansPush, resource

            sender = resource(service, engine)
            self._push = MetricsPush(endpoint, sender)
            self._spans = SpansPush(endpoint, sender, trace_sample_share)
            tracing.switch_on(self._spans.tracer)

    @property
    def metrics_address(self) -> str:
        """host:port of /metrics; empty where it is not served."""
        return self._server.address if self._server else ""

    def stop(self) -> None:
        """Sends what is left and ends; takes some seconds at most, also when nobody listens."""
        tracing.switch_off()
        if self._spans is not None:
            self._spans.stop()
        if self._push is not None:
            self._push.stop()
        if self._server is not None:
            self._server.stop()
        instruments.switch_off()
