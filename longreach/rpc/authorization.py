"""Which roles may call which services, decided from the caller's certificate.

Only installed where TLS is on. Health checks are answered to anybody; what a policy does not name
needs a certificate of any role.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health

from longreach.errors import PermissionDenied, Unauthenticated
from longreach.rpc.status import error_to_status
from longreach.rpc.tls import Peer, peer_of
from longreach.security.api_keys import ApiKeys
from longreach.security.peers import Role

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True)
class Policy:
    """Roles by full service name or by "service/Method", which wins.

    `open_services` may be called without a certificate, but not without TLS.
    """

    roles: Mapping[str, frozenset[Role]]
    open_services: frozenset[str] = frozenset()

    def check(self, method: str, peer: Peer) -> None:
        """Raises Unauthenticated or PermissionDenied; `method` is "/package.Service/Method"."""
        name = method.removeprefix("/")
        service = name.partition("/")[0]
        if service == health.SERVICE_NAME:
            return
        if peer.identity is None:
            if service in self.open_services and peer.encrypted:
                return
            raise Unauthenticated(
                f"{name} needs a certificate of this cluster's CA with a name such as "
                "longreach://client/NAME; connect to the TLS port and show one"
            )
        allowed = self.roles.get(name, self.roles.get(service, frozenset(Role)))
        if peer.identity.role not in allowed:
            raise PermissionDenied(
                f"{peer.identity} may not call {name}, only "
                f"{', '.join(sorted(role.value for role in allowed))} may",
                reason="WRONG_ROLE",
            )


class Authorization(grpc.ServerInterceptor):
    """Applies a policy to a blocking server."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Puts the check before the handler."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method

        def guarded(inner: Any) -> Any:
            def call(request: Any, context: grpc.ServicerContext) -> Any:
                try:
                    self._policy.check(method, peer_of(context))
                except (Unauthenticated, PermissionDenied) as error:
                    context.abort_with_status(error_to_status(error))
                return inner(request, context)

            return call

        return _wrapped(handler, guarded)


class _AsyncGuard(grpc.aio.ServerInterceptor):
    """Puts a check before every handler of an asyncio server."""

    def _check(self, method: str, context: Any) -> None:
        """Raises Unauthenticated or PermissionDenied."""
        raise NotImplementedError

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Puts the check before the handler."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method

        async def check(context: Any) -> None:
            try:
                self._check(method, context)
            except (Unauthenticated, PermissionDenied) as error:
                status = error_to_status(error)
                await context.abort(status.code, status.details, status.trailing_metadata)

        def guarded(inner: Any) -> Any:
            async def stream(request: Any, context: Any) -> Any:
                await check(context)
                async for reply in inner(request, context):
                    yield reply

            async def unary(request: Any, context: Any) -> Any:
                await check(context)
                return await inner(request, context)

            return stream if inspect.isasyncgenfunction(inner) else unary

        return _wrapped(handler, guarded)


class AsyncAuthorization(_AsyncGuard):
    """Applies a policy to an asyncio server."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def _check(self, method: str, context: Any) -> None:
        self._policy.check(method, peer_of(context))


class AsyncApiKeys(_AsyncGuard):
    """Asks callers of some services for an API key, as metadata `authorization: Bearer KEY`."""

    def __init__(self, keys: ApiKeys, services: frozenset[str]) -> None:
        self._keys = keys
        self._services = services

    def _check(self, method: str, context: Any) -> None:
        if method.removeprefix("/").partition("/")[0] in self._services:
            metadata = dict(context.invocation_metadata() or ())
            self._keys.check(str(metadata.get("authorization", "")))


def _wrapped(handler: Handler, guarded: Callable[[Any], Any]) -> Handler:
    """The handler with another behaviour of the same kind."""
    coders = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(guarded(handler.unary_unary), **coders)
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(guarded(handler.unary_stream), **coders)
    if handler.stream_unary:
        return grpc.stream_unary_rpc_method_handler(guarded(handler.stream_unary), **coders)
    return grpc.stream_stream_rpc_method_handler(guarded(handler.stream_stream), **coders)
