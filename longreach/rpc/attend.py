"""The token path: one long-lived Attend stream from a worker to a node."""

from __future__ import annotations

import grpc

from longreach.rpc.channels import MAX_MESSAGE_BYTES, aio_channel
from longreach.rpc.reply_stream import ReplyStream
from longreach.v1 import retrieval_pb2, retrieval_pb2_grpc


class AttendStream:
    """Attend requests to one node, replies by request id; for the worker's own event loop.

        for stream, request in sends:               # run_until_complete(write_all())
            await stream.write(request)
        ...                                         # local attention, outside the loop
        for stream, request in sends:               # run_until_complete(collect_all())
            response = await stream.read(request.request_id)

    Build requests with `wire.attend_request`, read replies with `wire.attend_results_from_proto`.
    A stream that broke raises Unavailable for what it had in flight and reconnects at the next
    write.
    """

    def __init__(
        self,
        address: str,
        *,
        max_in_flight_bytes: int = 2 * MAX_MESSAGE_BYTES,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.address = address
        self._max_in_flight_bytes = max_in_flight_bytes
        self._credentials = credentials
        self._channel: grpc.aio.Channel | None = None
        self._stream: (
            ReplyStream[retrieval_pb2.AttendRequest, retrieval_pb2.AttendResponse] | None
        ) = None

    async def write(self, request: retrieval_pb2.AttendRequest) -> None:
        """Sends a request; its id is used once on a stream. `read` raises what went wrong.

        Every request that was written is read or forgotten: what is in flight is capped.
        """
        stream = self._stream or self._open()
        await stream.write(request.request_id, request)

    async def read(
        self, request_id: int, timeout_s: float | None = None
    ) -> retrieval_pb2.AttendResponse:
        """The reply to a request that was written, once.

        Raises Unavailable when the node or the stream broke, DeadlineExceeded after `timeout_s`.
        """
        assert self._stream is not None, "read comes after write"
        return await self._stream.read(request_id, timeout_s)

    def forget(self, request_id: int) -> None:
        """Drops the reply to a request that will not be read after all."""
        if self._stream is not None:
            self._stream.forget(request_id)

    def _open(self) -> ReplyStream[retrieval_pb2.AttendRequest, retrieval_pb2.AttendResponse]:
        self._channel = aio_channel(
            self.address, own_connection=True, credentials=self._credentials
        )
        stub = retrieval_pb2_grpc.RetrievalServiceStub(self._channel)
        self._stream = ReplyStream(
            stub.Attend,
            lambda response: response.request_id,
            peer=self.address,
            max_in_flight_bytes=self._max_in_flight_bytes,
        )
        return self._stream

    async def close(self) -> None:
        """Ends the stream and its connection."""
        if self._stream is not None:
            await self._stream.close()
        if self._channel is not None:
            await self._channel.close()
