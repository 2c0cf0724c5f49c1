"""Opens the gateway that a configuration asks for."""

from __future__ import annotations

from coordinator.config import CoordinatorConfig
from coordinator.coordinator import Coordinator
from coordinator.gateway.http import Gateway
from coordinator.gateway.tls import https_context
from longreach.security.api_keys import ApiKeys
from longreach.security.tls import TlsFiles


async def open_gateway(
    config: CoordinatorConfig, coordinator: Coordinator, keys: ApiKeys, files: TlsFiles | None
) -> Gateway:
    """A gateway over the coordinator's sessions that serves on `http_listen`."""
    gateway = Gateway(
        coordinator.sessions.generate,
        coordinator.models,
        keys,
        ready=lambda: coordinator.ready,
        body_bytes_max=config.max_context_bytes,
        chat_template=config.chat_template,
    )
    await gateway.start(config.http_listen, https_context(config, files) if files else None)
    return gateway
