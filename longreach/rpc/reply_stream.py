"""A long-lived bidirectional stream whose replies are matched to requests by number."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import grpc

from longreach.errors import DeadlineExceeded, Internal, LongreachError, Unavailable
from longreach.rpc.status import error_from_rpc


class Message(Protocol):
    """A protobuf message."""

    def ByteSize(self) -> int:  # noqa: N802
        """Bytes when serialised."""
        ...


Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")
Call = grpc.aio.StreamStreamCall[Any, Any]


class ReplyStream(Generic[Request, Response]):
    """Writes requests, keeps a read pending, hands each reply to whoever asks for its number.

    The call is opened by the first write and opened again by the first write after it broke;
    everything unanswered fails when it breaks. Belongs to one event loop. The loop may stop between
    `write` and `read`: what arrives meanwhile is delivered when it runs again.
    """

    def __init__(
        self,
        open_call: Callable[[], Call],
        reply_number: Callable[[Response], int],
        *,
        peer: str,
        max_in_flight_bytes: int,
    ) -> None:
        self._open_call = open_call
        self._reply_number = reply_number
        self._peer = peer
        self._max_in_flight_bytes = max_in_flight_bytes
        self._call: Call | None = None
        self._reader: asyncio.Task[None] | None = None
        self._write_lock = asyncio.Lock()
        self._sending: asyncio.Task[None] | None = None
        self._replies: dict[int, asyncio.Future[Response]] = {}
        self._unanswered_bytes: dict[int, int] = {}
        self._in_flight_bytes = 0

    async def write(self, number: int, request: Request) -> None:
        """Sends the request with this number, which is used once on a stream.

        Returns when the request is on its way; what breaks the stream is raised by `read`. Waits
        for replies while more than `max_in_flight_bytes` are unanswered. Follow it with `read` or
        `forget`.
        """
        size = request.ByteSize()
        async with self._write_lock:  # A call takes one write at a time.
            while self._unanswered_bytes and self._in_flight_bytes + size > (
                self._max_in_flight_bytes
            ):
                await asyncio.wait([self._replies[next(iter(self._unanswered_bytes))]])
            if self._sending is not None:
                await self._sending
            call = self._call or self._connect()
            loop = asyncio.get_running_loop()
            self._replies[number] = loop.create_future()
            self._unanswered_bytes[number] = size
            self._in_flight_bytes += size
            # gRPC writes to the socket in the task's first step, which runs now. That the write is
            # complete it says much later; by then the caller can be computing.
            self._sending = loop.create_task(self._send(call, request))
            await asyncio.sleep(0)

    async def _send(self, call: Call, request: Request) -> None:
        try:
            await call.write(request)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._break(call, self._meant(error))

    async def read(self, number: int, timeout_s: float | None = None) -> Response:
        """The reply to the request with this number, once.

        Raises DeadlineExceeded when it takes longer, Unavailable when the stream broke; a reply
        that comes after its deadline is dropped.
        """
        reply = self._replies[number]
        try:
            async with asyncio.timeout(timeout_s):
                return await reply
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self._peer} did not answer request {number} within {timeout_s} s"
            ) from None
        finally:
            self.forget(number)

    def forget(self, number: int) -> None:
        """Drops the reply to this request, come or still to come."""
        reply = self._replies.pop(number, None)
        if reply is not None:
            reply.cancel()
        self._answered(number)

    def _answered(self, number: int) -> None:
        self._in_flight_bytes -= self._unanswered_bytes.pop(number, 0)

    def _connect(self) -> Call:
        self._call = self._open_call()
        self._reader = asyncio.get_running_loop().create_task(self._receive(self._call))
        return self._call

    async def _receive(self, call: Call) -> None:
        error: LongreachError = self._ended()
        try:
            while True:
                response: Any = await call.read()
                if response is grpc.aio.EOF:
                    break
                number = self._reply_number(response)
                self._answered(number)
                reply = self._replies.get(number)
                if reply is not None and not reply.done():
                    reply.set_result(response)
        except Exception as failure:
            error = self._meant(failure)
        self._break(call, error)

    def _meant(self, error: Exception) -> LongreachError:
        if isinstance(error, grpc.RpcError):
            return error_from_rpc(error, peer=self._peer)
        if isinstance(error, asyncio.InvalidStateError):
            return self._ended()
        return Internal(f"{self._peer} sent a reply that cannot be read: {error!r}")

    def _ended(self) -> LongreachError:
        return Unavailable(f"{self._peer} ended the stream; send again to reconnect")

    def _break(self, call: Call, error: LongreachError) -> None:
        """Fails everything unanswered on this call, so that the next write opens another."""
        if self._call is not call:
            return
        self._call = None
        call.cancel()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(error)
                reply.exception()  # Read already, as far as asyncio's warning is concerned.
        self._unanswered_bytes.clear()
        self._in_flight_bytes = 0

    async def close(self) -> None:
        """Ends the stream; unanswered requests fail with Unavailable."""
        if self._call is not None:
            self._break(self._call, Unavailable(f"the stream to {self._peer} was closed here"))
        for task in (self._reader, self._sending):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
