"""A long-lived bidirectional stream whose replies are matched to requests by number."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc

from longreach.errors import ConnectionLost, DeadlineExceeded, Internal, LongreachError
from longreach.rpc.status import error_from_rpc


class Message(Protocol):
    """A protobuf message."""

    def ByteSize(self) -> int:  # noqa: N802
        """Bytes when serialised."""
        ...


Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")
Call = grpc.aio.StreamStreamCall[Any, Any]


@dataclass(slots=True)
class _Asked(Generic[Request, Response]):
    """A request, its size once it was sent, and what waits for its reply until `expires`."""

    request: Request
    reply: asyncio.Future[Response]
    expires: float
    on_done: Callable[[], None] | None
    bytes_sent: int = 0

    def succeed(self, response: Response) -> None:
        """Ends the wait with the reply."""
        if not self.reply.done():
            self.reply.set_result(response)
        if self.on_done is not None:
            self.on_done()

    def fail(self, error: LongreachError) -> None:
        """Ends the wait with an error."""
        if not self.reply.done():
            self.reply.set_exception(error)
            self.reply.exception()  # Read already, as far as asyncio's warning is concerned.
        if self.on_done is not None:
            self.on_done()


class ReplyStream(Generic[Request, Response]):
    """Sends requests in order, keeps a read pending, gives each reply to the future of its number.

    The call is opened by the first request and opened again by the first one after it broke;
    everything unanswered fails when it breaks. Belongs to one event loop. The loop may stand still
    at any time: what arrives meanwhile is delivered when it turns again.
    """

    def __init__(
        self,
        open_call: Callable[[], Call],
        reply_number: Callable[[Response], int],
        loop: asyncio.AbstractEventLoop,
        *,
        peer: str,
        max_in_flight_bytes: int,
    ) -> None:
        self._open_call = open_call
        self._reply_number = reply_number
        self._loop = loop
        self._peer = peer
        self._max_in_flight_bytes = max_in_flight_bytes
        self._call: Call | None = None
        self._reader: asyncio.Task[None] | None = None
        self._sender: asyncio.Task[None] | None = None
        self._unsent: deque[int] = deque()
        self._asked: dict[int, _Asked[Request, Response]] = {}
        self._in_flight_bytes = 0
        self._highest = 0
        self._room = asyncio.Event()
        self._watch: asyncio.TimerHandle | None = None

    @property
    def unsent(self) -> int:
        """Requests that gRPC has not been given yet."""
        return len(self._unsent)

    def submit(
        self,
        number: int,
        request: Request,
        timeout_s: float = math.inf,
        on_done: Callable[[], None] | None = None,
    ) -> asyncio.Future[Response]:
        """The reply to come to a request, whose number is used once on a stream.

        Needs no running loop; the request leaves when the loop turns next, unless an earlier one is
        still being written or more than `max_in_flight_bytes` are unanswered. The future ends with
        DeadlineExceeded after `timeout_s` and with Unavailable when the stream breaks; cancelling
        it drops the reply. `on_done` is called as soon as the future has ended but for a
        cancellation, a turn of the loop before the future's own callbacks.
        """
        expires = self._loop.time() + timeout_s
        asked: _Asked[Request, Response] = _Asked(
            request, self._loop.create_future(), expires, on_done
        )
        self._asked[number] = asked
        self._highest = max(self._highest, number)
        self._unsent.append(number)
        if self._sender is None:
            self._sender = self._loop.create_task(self._send())
        if expires < (self._watch.when() if self._watch else math.inf):
            self._watch_until(expires)
        return asked.reply

    async def _send(self) -> None:
        """Writes what waits, one after another: a call takes one write at a time.

        gRPC writes to the socket before the first wait in `write`. That the write is complete it
        says much later; by then the caller can be computing.
        """
        try:
            while self._unsent:
                asked = self._asked.get(self._unsent[0])
                if asked is None or asked.reply.cancelled():
                    self._asked.pop(self._unsent.popleft(), None)
                    continue
                size = asked.request.ByteSize()
                if self._in_flight_bytes and (
                    self._in_flight_bytes + size > self._max_in_flight_bytes
                ):
                    self._room.clear()
                    await self._room.wait()
                    continue
                self._unsent.popleft()
                asked.bytes_sent = size
                self._in_flight_bytes += size
                await self._write(asked.request)
        finally:
            self._sender = None

    async def _write(self, request: Request) -> None:
        call = self._call or self._connect()
        try:
            await call.write(request)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._break(call, self._meant(error))

    def _watch_until(self, expires: float) -> None:
        """One timer for all requests: it fires at the first deadline there was, answered or not, so
        that a request costs no timer of its own."""
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self._loop.call_at(expires, self._expire)

    def _expire(self) -> None:
        self._watch = None
        now = self._loop.time()
        for number in [n for n, asked in self._asked.items() if asked.expires <= now]:
            asked = self._answered(number)
            if asked is not None:
                asked.fail(
                    DeadlineExceeded(f"{self._peer} did not answer request {number} in its time")
                )
        left = min((asked.expires for asked in self._asked.values()), default=math.inf)
        if left < math.inf:
            self._watch_until(left)

    def _answered(self, number: int) -> _Asked[Request, Response] | None:
        asked = self._asked.pop(number, None)
        if asked is not None and asked.bytes_sent:
            self._in_flight_bytes -= asked.bytes_sent
            self._room.set()
        return asked

    def _connect(self) -> Call:
        self._call = self._open_call()
        self._reader = self._loop.create_task(self._receive(self._call))
        return self._call

    async def _receive(self, call: Call) -> None:
        error: LongreachError = self._ended()
        try:
            while True:
                response: Any = await call.read()
                if response is grpc.aio.EOF:
                    break
                number = self._reply_number(response)
                asked = self._answered(number)
                if asked is not None:  # Else it came after its deadline.
                    asked.succeed(response)
                elif number > self._highest:
                    error = Internal(f"{self._peer} answered request {number}, which nobody made")
                    break
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
        return ConnectionLost(f"{self._peer} ended the stream; send again to reconnect")

    def _break(self, call: Call | None, error: LongreachError) -> None:
        """Fails everything unanswered on this call, so that the next request opens another."""
        if self._call is not call:
            return
        self._call = None
        if call is not None:
            call.cancel()
        unanswered = list(self._asked.values())
        self._asked.clear()
        self._unsent.clear()
        for asked in unanswered:
            asked.fail(error)
        self._in_flight_bytes = 0
        self._room.set()

    async def close(self) -> None:
        """Ends the stream; unanswered requests fail with Unavailable."""
        self._break(self._call, ConnectionLost(f"the stream to {self._peer} was closed here"))
        if self._watch is not None:
            self._watch.cancel()
        for task in (self._reader, self._sender):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
