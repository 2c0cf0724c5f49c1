"""Telemetry of a service process, from its configuration: started once, stopped at the end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from longreach.security.tls import TlsFiles
from longreach.telemetry import instruments
from longreach.telemetry.settings import TelemetrySettings

if TYPE_CHECKING:
    from longreach.telemetry.otlp import MetricsPush
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
        if settings.metrics_listen:
            from longreach.telemetry.prometheus import MetricsServer

            self._server = MetricsServer(settings.metrics_listen)
            _log.info("metrics at http://%s/metrics", self._server.address)

    def begin(
        self, service: str, engine: str, *, model_name: str = "", files: TlsFiles | None = None
    ) -> None:
        """Begins to measure.

        service: "coordinator", "worker" or "node". engine: the service's own id. model_name: where
        it serves one model. files: whose certificate's end is exported.
        """
        endpoint = self._settings.otlp_endpoint
        if self._server is None and not endpoint:
            return
        labels = {"engine": engine, **({"model_name": model_name} if model_name else {})}
        instruments.switch_on(service, labels)
        if files is not None and files.identity is not None:
            instruments.gauge("certificate_not_after_seconds").observe(files.not_after_s)
        if endpoint:
            from longreach.telemetry.otlp import MetricsPush, resource

            self._push = MetricsPush(endpoint, resource(service, engine))

    @property
    def metrics_address(self) -> str:
        """host:port of /metrics; empty where it is not served."""
        return self._server.address if self._server else ""

    def stop(self) -> None:
        """Sends what is left and ends; takes some seconds at most, also when nobody listens."""
        if self._push is not None:
            self._push.stop()
        if self._server is not None:
            self._server.stop()
        instruments.switch_off()
