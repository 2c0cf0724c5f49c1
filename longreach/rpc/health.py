"""Health and reflection on every server: grpc.health.v1 and grpc.reflection.v1alpha.

The empty service name answers for liveness: SERVING as long as the process runs. The full names of
the services answer for readiness, NOT_SERVING until switched.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection


def _status(ready: bool) -> int:
    response = health_pb2.HealthCheckResponse
    return response.SERVING if ready else response.NOT_SERVING  # type: ignore[no-any-return]


class Readiness:
    """The readiness switch of a blocking server; any thread may turn it."""

    def __init__(self, servicer: health.HealthServicer, service_names: Sequence[str]) -> None:
        self._servicer = servicer
        self._service_names = tuple(service_names)

    def set(self, ready: bool) -> None:
        """Says whether the services take work."""
        for name in self._service_names:
            self._servicer.set(name, _status(ready))


class AsyncReadiness:
    """The readiness switch of an asyncio server."""

    def __init__(self, servicer: health.aio.HealthServicer, service_names: Sequence[str]) -> None:
        self._servicer = servicer
        self._service_names = tuple(service_names)

    async def set(self, ready: bool) -> None:
        """Says whether the services take work."""
        for name in self._service_names:
            await self._servicer.set(name, _status(ready))


def serve_health(server: grpc.Server, service_names: Sequence[str]) -> Readiness:
    """Adds health and reflection to a blocking server before it starts; not ready at first.

    `service_names` are full names, for example "longreach.v1.RetrievalService".
    """
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    _serve_reflection(server, service_names)
    readiness = Readiness(servicer, service_names)
    readiness.set(False)
    return readiness


async def serve_health_async(
    server: grpc.aio.Server, service_names: Sequence[str]
) -> AsyncReadiness:
    """Adds health and reflection to an asyncio server before it starts; not ready at first."""
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    _serve_reflection(server, service_names)
    readiness = AsyncReadiness(servicer, service_names)
    await readiness.set(False)
    return readiness


def _serve_reflection(server: grpc.Server | grpc.aio.Server, service_names: Sequence[str]) -> None:
    names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
