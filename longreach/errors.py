"""Every error longreach raises on purpose.

    LongreachError
    ├── InvalidRequest        the caller's input is wrong (INVALID_ARGUMENT)
    │   └── MalformedTensor   bytes, dtype and shape of a tensor disagree
    ├── NotFound              an unknown context, session, handle, model or node (NOT_FOUND)
    ├── PermissionDenied      a capability that was not signed for this (PERMISSION_DENIED)
    ├── Unauthenticated       no or a wrong API key (UNAUTHENTICATED)
    ├── FailedPrecondition    right request, wrong state (FAILED_PRECONDITION)
    │   ├── IdentityMismatch  KV of another model, dtype, rope regime, prefill or tenant
    │   └── StaleEpoch        another writer took the session over
    ├── ResourceExhausted     a budget is spent; try later or ask for less (RESOURCE_EXHAUSTED)
    ├── Unavailable           a node or worker does not answer (UNAVAILABLE)
    │   ├── ConnectionLost    nobody answered: the connection broke or could not be made
    │   └── CoverageTooLow    shards of the scope did not answer
    ├── Aborted               what it worked on was taken away (ABORTED)
    ├── Cancelled             the caller went away (CANCELLED)
    ├── DeadlineExceeded      took longer than allowed (DEADLINE_EXCEEDED)
    ├── UnsupportedModel      a model this worker cannot serve exactly, with the reason
    └── Internal              a bug or a broken peer (INTERNAL)

Each message names what was wrong, the value, the limit and what to do next. `reason` is a stable
machine-readable word; `code` is the gRPC status code's number, so that this module and the cores
need not import grpc.
"""

from __future__ import annotations

from typing import ClassVar


class LongreachError(Exception):
    """Base of all. `code`: gRPC status number. `reason`: stable word. `retry_after_s`: hint."""

    code: ClassVar[int] = 2
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self, message: str, *, reason: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.retry_after_s = retry_after_s


class InvalidRequest(LongreachError):
    """The caller's input is wrong."""

    code = 3
    default_reason = "INVALID_REQUEST"


class MalformedTensor(InvalidRequest):
    """Bytes, dtype and shape of a tensor disagree, or it holds NaN or infinity."""

    default_reason = "MALFORMED_TENSOR"


class UnsupportedModel(InvalidRequest):
    """A model that cannot be served exactly; the message says why and what is supported."""

    default_reason = "UNSUPPORTED_MODEL"


class NotFound(LongreachError):
    """An unknown context, session, handle, model or node."""

    code = 5
    default_reason = "NOT_FOUND"


class PermissionDenied(LongreachError):
    """A capability or handle that was not signed for this."""

    code = 7
    default_reason = "PERMISSION_DENIED"


class Unauthenticated(LongreachError):
    """No API key, or a wrong one."""

    code = 16
    default_reason = "UNAUTHENTICATED"


class FailedPrecondition(LongreachError):
    """The request is right but the state is not."""

    code = 9
    default_reason = "FAILED_PRECONDITION"


class IdentityMismatch(FailedPrecondition):
    """KV of another model, dtype, rope regime, prefill method or tenant."""

    default_reason = "IDENTITY_MISMATCH"


class StaleEpoch(FailedPrecondition):
    """Another writer took the session over."""

    default_reason = "STALE_EPOCH"


class ResourceExhausted(LongreachError):
    """A budget is spent."""

    code = 8
    default_reason = "RESOURCE_EXHAUSTED"


class Unavailable(LongreachError):
    """A node or worker does not answer."""

    code = 14
    default_reason = "UNAVAILABLE"


class ConnectionLost(Unavailable):
    """Nobody answered: the connection broke or could not be made. Raised on the caller's side; a
    peer that answers "unavailable" is Unavailable."""

    default_reason = "CONNECTION_LOST"


class CoverageTooLow(Unavailable):
    """Shards of the scope did not answer and the caller did not allow it."""

    default_reason = "COVERAGE_TOO_LOW"


class Aborted(LongreachError):
    """What the call worked on was taken away, such as a deleted context."""

    code = 10
    default_reason = "ABORTED"


class Cancelled(LongreachError):
    """The caller went away."""

    code = 1
    default_reason = "CANCELLED"


class DeadlineExceeded(LongreachError):
    """Took longer than allowed."""

    code = 4
    default_reason = "DEADLINE_EXCEEDED"


class Internal(LongreachError):
    """A bug, or a peer that broke the protocol."""

    code = 13
    default_reason = "INTERNAL"


def _all_errors() -> list[type[LongreachError]]:
    found: list[type[LongreachError]] = []
    todo = [LongreachError]
    while todo:
        error = todo.pop(0)
        found.append(error)
        todo.extend(error.__subclasses__())
    return found


def error_for(code: int, reason: str, message: str) -> LongreachError:
    """The error a peer meant: the class with that reason, else the first with that code."""
    known = _all_errors()
    for error in known:
        if error.default_reason == reason and error.code == code:
            return error(message, reason=reason)
    for error in known:
        if error.code == code and error is not LongreachError:
            return error(message, reason=reason)
    return LongreachError(message, reason=reason)
