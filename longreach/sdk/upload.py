"""A document on its way up, and the progress that comes down."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from longreach.rpc.status import error_from_rpc
from longreach.sdk import messages
from longreach.sdk.models import Context
from longreach.sdk.retries import silent
from longreach.sdk.watch import Watch
from longreach.v1 import generation_pb2 as pb


class Upload:
    """One CreateContext call: iterate to read the context as it stands, then take `finished()`.

    Leaving it as a context manager cancels the call if it has not ended.
    """

    def __init__(
        self,
        method: Any,
        requests: Iterator[pb.CreateContextRequest],
        *,
        peer: str,
        timeout_s: float | None,
        metadata: tuple[tuple[str, str], ...],
        watch: Callable[[Callable[[], object]], Watch | None] = lambda cancel: None,
    ) -> None:
        self._source = _Source(requests)
        self._peer = peer
        self._last: Context | None = None
        self._call = method(self._source, timeout=timeout_s, metadata=metadata)
        self._source.attach(self._call.cancel)
        self._watch = watch(self._call.cancel)

    def __iter__(self) -> Iterator[Context]:
        return self

    def __next__(self) -> Context:
        try:
            with self._watch or contextlib.nullcontext():
                reply = next(self._call)
        except StopIteration:
            self._source.raise_error()
            raise
        except grpc.RpcError as error:
            self._source.raise_error()
            if self._watch is not None and self._watch.lost:
                raise silent(self._peer) from None
            raise error_from_rpc(error, peer=self._peer) from error
        self._last = messages.context_from_proto(reply.context, found=reply.found)
        return self._last

    def finished(self) -> Context:
        """The stored context. Raises what kept it from becoming ready."""
        return messages.finished_context(self._last)

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.stop()
        self._call.cancel()


class _Source:
    """The requests as gRPC reads them, in a thread of its own, where an exception would be lost.

    It is kept instead and the call is cancelled, so that the server never takes part of a document
    for the whole.
    """

    def __init__(self, requests: Iterator[pb.CreateContextRequest]) -> None:
        self._requests = requests
        self._error: BaseException | None = None
        self._attached = threading.Event()
        self._cancel: Callable[[], object] = lambda: None

    def attach(self, cancel: Callable[[], object]) -> None:
        """Sets what cancels the call."""
        self._cancel = cancel
        self._attached.set()

    def raise_error(self) -> None:
        """Raises what the document's source raised, if it did."""
        if self._error is not None:
            raise self._error

    def __iter__(self) -> Iterator[pb.CreateContextRequest]:
        return self

    def __next__(self) -> pb.CreateContextRequest:
        try:
            return next(self._requests)
        except StopIteration:
            raise
        except BaseException as error:
            self._error = error
            self._attached.wait()
            self._cancel()
            # After cancel() gRPC sends no half-close, so the server sees no end of the document.
            raise StopIteration from None
