"""Errors inside a stream, where a gRPC status would end every request on it."""

from __future__ import annotations

from longreach.errors import LongreachError, error_for
from longreach.v1 import common_pb2


def error_to_proto(error: LongreachError) -> common_pb2.StreamError:
    """The error's code, reason and message."""
    return common_pb2.StreamError(code=error.code, reason=error.reason, message=error.message)


def error_from_proto(msg: common_pb2.StreamError) -> LongreachError:
    """The error that the peer meant."""
    return error_for(msg.code, msg.reason, msg.message)
