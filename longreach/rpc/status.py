"""Errors across gRPC: LongreachError <-> status code + google.rpc.ErrorInfo and RetryInfo."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from longreach.errors import ConnectionLost, Internal, LongreachError, Unavailable, error_for

ERROR_DOMAIN = "longreach"
"""Domain of every ErrorInfo that longreach sends."""

# What grpc.aio says when it writes to a connection that has just broken.
_WRITE_FAILED_DETAILS = "Internal error from Core"

# How the details of UNKNOWN begin when a connection ends, damaged for instance, under a call that
# has not got its status yet. No peer sends it.
_STREAM_REMOVED_DETAILS = "Stream removed"

# What gRPC says when TLS fails, and what that means here.
_TLS_HINTS = {
    "Hostname Verification Check failed": " (the certificate there does not name the member that "
    "is expected at this address)",
    "CERTIFICATE_VERIFY_FAILED": " (the certificate there is not signed by the CA of tls_ca)",
    "WRONG_VERSION_NUMBER": " (no TLS is spoken there; leave tls_ca empty, or turn TLS on there)",
    "Socket closed": " (a server that asks for TLS or for a certificate closes so, too: see "
    "tls_ca, tls_cert and tls_key)",
}

Method = TypeVar("Method", bound=Callable[..., Any])
_log = logging.getLogger(__name__)


def error_to_status(error: LongreachError) -> grpc.Status:
    """The gRPC status of an error, with its reason and retry hint as details."""
    details = [_packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN))]
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    status = status_pb2.Status(code=error.code, message=error.message, details=details)
    return rpc_status.to_status(status)  # type: ignore[no-any-return]


def _packed(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def error_from_rpc(error: grpc.RpcError, *, peer: str = "") -> LongreachError:
    """The LongreachError a peer raised, or the one that says why it could not be asked.

    `peer` (host:port) is named in the message when the transport failed, not the peer.
    """
    if not isinstance(error, (grpc.Call, grpc.aio.AioRpcError)):
        return Internal(f"gRPC failed without a status: {error!r}")
    code = error.code().value[0]
    details = error.details() or ""
    status = _rich_status(error)
    if status is None and details == _WRITE_FAILED_DETAILS:
        return ConnectionLost(f"the connection to {peer or 'the peer'} broke while sending")
    if status is None:
        where = f"{peer}: " if peer else ""
        hint = next((h for sign, h in _TLS_HINTS.items() if sign in details), "")
        message = f"{where}{details or error.code().name}{hint}"
        removed = error.code() is grpc.StatusCode.UNKNOWN and details.startswith(
            _STREAM_REMOVED_DETAILS
        )
        if code == Unavailable.code or removed:
            return ConnectionLost(message)
        return error_for(code, error.code().name, message)
    reason, retry_after_s = error.code().name, None
    for detail in status.details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            reason = info.reason
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    found = error_for(code, reason, status.message)
    if isinstance(found, ConnectionLost):  # The peer's connection to somebody else.
        found = Unavailable(status.message, reason=reason)
    found.retry_after_s = retry_after_s
    return found


def _rich_status(error: Any) -> Any | None:
    """The google.rpc.Status in the trailers; None when there is none or it is not to be trusted."""
    try:
        return rpc_status.from_call(error)
    except ValueError:
        return None


def map_errors(method: Method) -> Method:
    """Decorates a servicer method: what it raises becomes the call's status.

    Takes blocking functions and generators, coroutine functions and async generators.
    LongreachErrors keep code, reason and message; any other exception is logged with its trace and
    becomes INTERNAL, without its text.
    """
    wrapper: Callable[..., Any]
    if inspect.isasyncgenfunction(method):
        wrapper = _async_stream(method)
    elif inspect.iscoroutinefunction(method):
        wrapper = _async_unary(method)
    elif inspect.isgeneratorfunction(method):
        wrapper = _stream(method)
    else:
        wrapper = _unary(method)
    return functools.wraps(method)(wrapper)  # type: ignore[return-value]


def _unary(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except Exception as error:
            _abort(context, error, method)

    return call


def _stream(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            yield from method(self, request, context)
        except Exception as error:
            _abort(context, error, method)

    return call


def _async_unary(method: Callable[..., Any]) -> Callable[..., Any]:
    async def call(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await method(self, request, context)
        except Exception as error:
            await _abort_async(context, error, method)

    return call


def _async_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    async def call(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            async for response in method(self, request, context):
                yield response
        except Exception as error:
            await _abort_async(context, error, method)

    return call


def _abort(context: grpc.ServicerContext, error: Exception, method: Callable[..., Any]) -> NoReturn:
    # The concrete context has code(); the interface that grpcio publishes does not say so.
    if _is_transport(error, context.code()):  # type: ignore[attr-defined]
        raise error
    context.abort_with_status(error_to_status(_meant(error, method)))


async def _abort_async(
    context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: Callable[..., Any]
) -> NoReturn:
    if _is_transport(error, context.code()):
        raise error
    status = error_to_status(_meant(error, method))
    await context.abort(status.code, status.details, status.trailing_metadata)


def _is_transport(error: Exception, code: Any) -> bool:
    """Whether the method aborted by itself or the client went away: gRPC has the status already."""
    return bool(code) or isinstance(error, (grpc.RpcError, grpc.aio.AbortError))


def _meant(error: Exception, method: Callable[..., Any]) -> LongreachError:
    if isinstance(error, LongreachError):
        return error
    _log.error("%s failed", method.__qualname__, exc_info=error)
    return Internal(
        f"{method.__name__} failed with {type(error).__name__}; the trace is in the server's log"
    )
