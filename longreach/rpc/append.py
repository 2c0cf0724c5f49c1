"""K and V of new tokens on their way to a node, off the token path."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import grpc

from longreach import wire
from longreach.errors import ConnectionLost, LongreachError
from longreach.rpc.channels import sync_channel
from longreach.rpc.status import error_from_rpc
from longreach.rpc.tls import ChannelTls
from longreach.types import AppendEntry
from longreach.v1 import retrieval_pb2 as pb
from longreach.v1.retrieval_pb2_grpc import RetrievalServiceStub

_log = logging.getLogger(__name__)

OnAck = Callable[[int, int, LongreachError | None], None]
"""`on_ack(handle, stop, error)`: `stop` is one past the last position the node holds without a gap.
With an error nothing of the entry was stored, and `stop` is still what the node holds (0 where it
does not know the session); when the stream broke nobody knows, and `stop` is the entry's start."""


class AppendStream:
    """Sends entries to one node on a connection of its own; acknowledgements come by callback.

    `on_ack` runs on the stream's reader thread, once for each entry, in the order of the node's
    replies. When the stream breaks, every entry in flight is acknowledged with Unavailable and the
    next `submit` opens another: the caller's window is the retransmission buffer, so nothing is
    sent twice by itself.
    """

    def __init__(
        self,
        address: str,
        on_ack: OnAck,
        *,
        tls: ChannelTls | None = None,
    ) -> None:
        self.address = address
        self._on_ack = on_ack
        self._channel = sync_channel(address, own_connection=True, tls=tls)
        self._stub = RetrievalServiceStub(self._channel)
        self._lock = threading.Lock()
        self._call: _AppendCall | None = None

    def submit(self, entries: Sequence[AppendEntry]) -> None:
        """Queues the entries of a step as one message; returns at once.

        The entries' arrays are encoded later, on another thread: do not write to them again.
        """
        with self._lock:
            if self._call is None or not self._call.submit(entries):
                self._call = _AppendCall(self._stub, self.address, self._on_ack, entries)

    def close(self, timeout_s: float = 5.0) -> None:
        """Waits up to `timeout_s` for what was submitted, then ends the stream."""
        with self._lock:
            call, self._call = self._call, None
        if call is not None:
            call.finish(timeout_s)
        self._channel.close()


class _AppendCall:
    """One gRPC call: a queue that feeds it, the entries in flight, a thread that reads replies.

    It starts with its first entries, because it may end before any others could be submitted.
    """

    def __init__(
        self,
        stub: RetrievalServiceStub,
        address: str,
        on_ack: OnAck,
        first: Sequence[AppendEntry],
    ) -> None:
        self._address = address
        self._on_ack = on_ack
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[int, Sequence[AppendEntry]] | None] = (
            queue.SimpleQueue()
        )
        self._in_flight: dict[int, Sequence[AppendEntry]] = {}
        self._last_id = 0
        self._ended = False
        self._failure: LongreachError | None = None
        self.submit(first)
        self._call = stub.Append(self._requests())
        self._reader = threading.Thread(
            target=self._read, name=f"append-acks-{address}", daemon=True
        )
        self._reader.start()

    def submit(self, entries: Sequence[AppendEntry]) -> bool:
        """Queues the entries; False when the call has ended."""
        with self._lock:
            if self._ended:
                return False
            self._last_id += 1
            self._in_flight[self._last_id] = entries
            self._queue.put((self._last_id, entries))
            return True

    def finish(self, timeout_s: float) -> None:
        """Ends the requests, waits for their replies, then ends the call."""
        self._queue.put(None)
        if self._reader is threading.current_thread():  # A callback that closes the stream.
            self._call.cancel()
            return
        self._reader.join(timeout_s)
        self._call.cancel()
        self._reader.join()

    def _requests(self) -> Iterator[pb.AppendRequest]:
        """The messages, encoded on gRPC's thread. What cannot be encoded ends the call: gRPC would
        only say CANCELLED, so the reason is kept."""
        while (item := self._queue.get()) is not None:
            request_id, entries = item
            try:
                encoded = [wire.append_entry_to_proto(entry) for entry in entries]
            except LongreachError as error:
                self._failure = error
                raise
            yield pb.AppendRequest(request_id=request_id, entries=encoded)

    def _read(self) -> None:
        error: LongreachError = ConnectionLost(f"{self._address} ended the stream")
        try:
            for response in self._call:
                self._acknowledge(response)
        except grpc.RpcError as failure:
            error = self._failure or error_from_rpc(failure, peer=self._address)
        with self._lock:
            self._ended = True
            unanswered = list(self._in_flight.values())
            self._in_flight.clear()
        self._queue.put(None)  # Frees gRPC's thread, which waits for the next request.
        for entries in unanswered:
            for entry in entries:
                self._tell(entry.handle, entry.start, error)

    def _acknowledge(self, response: pb.AppendResponse) -> None:
        with self._lock:
            entries = self._in_flight.pop(response.request_id, ())
        for _, result in zip(entries, response.results, strict=False):
            refused = wire.error_from_proto(result.error) if result.HasField("error") else None
            self._tell(result.handle, result.stop, refused)

    def _tell(self, handle: int, stop: int, error: LongreachError | None) -> None:
        try:
            self._on_ack(handle, stop, error)
        except Exception:
            _log.exception("the callback for appends to %s failed", self._address)
