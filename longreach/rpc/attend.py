"""The token path: one long-lived Attend stream from a worker to a node."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import grpc

from longreach.rpc.channels import MAX_MESSAGE_BYTES, aio_channel
from longreach.rpc.reply_stream import Call, ReplyStream
from longreach.rpc.tls import ChannelTls
from longreach.v1.retrieval_pb2 import AttendRequest, AttendResponse
from longreach.v1.retrieval_pb2_grpc import RetrievalServiceStub


class AttendStream:
    """Attend requests to one node, on the worker's own event loop, which need not be running.

        replies = [stream.submit(request) for stream, request in sends]
        ...                                # turn the loop until nothing is `unsent`
        ...                                # local attention, outside the loop
        ...                                # run the loop until the replies are there

    Build requests with `wire.attend_request`, read replies with `wire.attend_results_from_proto`.
    A stream that broke fails what it had in flight with Unavailable and reconnects at the next
    request.
    """

    def __init__(
        self,
        address: str,
        loop: asyncio.AbstractEventLoop,
        *,
        max_in_flight_bytes: int = 2 * MAX_MESSAGE_BYTES,
        tls: ChannelTls | None = None,
    ) -> None:
        self.address = address
        self._tls = tls
        self._channel: grpc.aio.Channel | None = None
        self._stream: ReplyStream[AttendRequest, AttendResponse] = ReplyStream(
            self._open_call,
            lambda response: response.request_id,
            loop,
            peer=address,
            max_in_flight_bytes=max_in_flight_bytes,
        )

    @property
    def unsent(self) -> int:
        """Requests that gRPC has not been given yet; the loop must turn again for them."""
        return self._stream.unsent

    def submit(
        self,
        request: AttendRequest,
        timeout_s: float = math.inf,
        on_done: Callable[[], None] | None = None,
    ) -> asyncio.Future[AttendResponse]:
        """The reply to come; its request id is used once on a stream.

        Ends with Unavailable when the node or the stream broke, with DeadlineExceeded after
        `timeout_s`; `on_done` is called at once then. Cancel it to drop the reply.
        """
        return self._stream.submit(request.request_id, request, timeout_s, on_done)

    def _open_call(self) -> Call:
        if self._channel is None:  # A channel takes the loop that runs while it is made.
            self._channel = aio_channel(self.address, own_connection=True, tls=self._tls)
        return RetrievalServiceStub(self._channel).Attend()

    async def close(self) -> None:
        """Ends the stream and its connection."""
        await self._stream.close()
        if self._channel is not None:
            await self._channel.close()
