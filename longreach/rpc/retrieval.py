"""Clients of a retrieval node.

NodeClient blocks and serves workers' control and ingest; AsyncNodeClient serves the coordinator's
loop. AttendStream is the token path, AppendStream the way of new tokens.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import grpc
import numpy as np

from longreach import wire
from longreach.errors import LongreachError
from longreach.rpc.append import AppendStream
from longreach.rpc.attend import AttendStream
from longreach.rpc.channels import aio_channel, sync_channel
from longreach.rpc.status import error_from_rpc
from longreach.rpc.tls import ChannelTls
from longreach.types import (
    AppendEntry,
    AttendResult,
    AttendRows,
    CopyProgress,
    Identity,
    KvBlock,
    LayerGeometry,
    NodeStats,
    QuerySample,
    SessionInventory,
    SessionRecord,
    Shard,
    ShardInventory,
    ShardPart,
    Span,
)
from longreach.v1 import retrieval_pb2 as pb
from longreach.v1.retrieval_pb2_grpc import RetrievalServiceStub

__all__ = ["AppendStream", "AsyncNodeClient", "AttendStream", "NodeClient", "split_block"]

CONTROL_TIMEOUT_S = 30.0
"""Longest a control call may take."""
PUT_PART_BYTES = 8 << 20
"""Blocks longer than this are put in parts, so that no message nears the limit."""

P = ParamSpec("P")
R = TypeVar("R")


def _raises_longreach_errors(
    method: Callable[Concatenate[NodeClient, P], R],
) -> Callable[Concatenate[NodeClient, P], R]:
    @functools.wraps(method)
    def call(self: NodeClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None

    return call


class NodeClient:
    """Blocking client of one node, on a connection of its own; any thread may use it.

    Every method raises LongreachErrors: the node's own, or Unavailable and DeadlineExceeded.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = CONTROL_TIMEOUT_S,
        tls: ChannelTls | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._channel = sync_channel(address, own_connection=True, tls=tls)
        self._stub = RetrievalServiceStub(self._channel)

    @_raises_longreach_errors
    def put(
        self,
        context_id: str,
        shard: Shard,
        identity: Identity,
        geometry: Sequence[LayerGeometry],
        capability: bytes,
        parts: Iterable[KvBlock | QuerySample],
    ) -> int:
        """Streams blocks and query samples of a shard; returns the bytes the shard holds now.

        `parts` is consumed as fast as the node takes it, on a thread of gRPC's. Blocks and samples
        may come in any order; repeating one is a no-op. `geometry` is that of the shard's layers.
        """
        header = pb.PutHeader(
            context_id=context_id,
            shard=wire.shard_to_proto(shard),
            identity=wire.identity_to_proto(identity),
            layers=[wire.geometry_to_proto(layer) for layer in geometry],
            capability=capability,
        )
        failure: list[BaseException] = []
        try:
            return self._stub.Put(_put_requests(header, parts, failure)).bytes_stored
        except grpc.RpcError:
            if failure:
                raise failure[0] from None
            raise

    @_raises_longreach_errors
    def seal(
        self, context_id: str, shard_id: str, capability: bytes, token_ids: Sequence[int]
    ) -> tuple[int, int]:
        """Makes a shard immutable and visible; returns its CRC-32 and its bytes of K and V.

        `token_ids` are those of the shard's span.
        """
        response = self._stub.Seal(
            pb.SealRequest(
                context_id=context_id,
                shard_id=shard_id,
                capability=capability,
                token_ids=wire.tensor_to_proto(np.asarray(token_ids, np.int32)),
            ),
            timeout=self._timeout_s,
        )
        return response.checksum, response.bytes_stored

    @_raises_longreach_errors
    def open_session(
        self,
        capability: bytes,
        record: SessionRecord,
        identity: Identity,
        tail_shards: Sequence[Shard],
        geometry: Sequence[LayerGeometry],
        timeout_s: float | None = None,
    ) -> tuple[int, int]:
        """Opens a session; returns its handle and one past the last position the node holds.

        `tail_shards` name the layers and KV heads whose new tokens the node keeps.
        """
        response = self._stub.OpenSession(
            pb.OpenSessionRequest(
                capability=capability,
                record=wire.session_record_to_proto(record),
                identity=wire.identity_to_proto(identity),
                tail_shards=[wire.shard_to_proto(shard) for shard in tail_shards],
                layers=[wire.geometry_to_proto(layer) for layer in geometry],
            ),
            timeout=timeout_s or self._timeout_s,
        )
        return response.handle, response.stop

    @_raises_longreach_errors
    def close_session(self, handle: int, timeout_s: float | None = None) -> int:
        """Ends a session; returns the bytes of tail freed."""
        request = pb.CloseSessionRequest(handle=handle)
        return self._stub.CloseSession(request, timeout=timeout_s or self._timeout_s).bytes_freed

    @_raises_longreach_errors
    def append(self, entries: Iterable[AppendEntry], timeout_s: float | None = None) -> int:
        """Stores entries of one session in order, outside any long-lived stream; returns one past
        the last position the node then holds. Raises why the first one was refused, and what
        `entries` raise."""
        failure: list[BaseException] = []
        stop = 0
        try:
            for response in self._stub.Append(
                _append_requests(entries, failure), timeout=timeout_s or self._timeout_s
            ):
                for result in response.results:
                    if result.HasField("error"):
                        raise wire.error_from_proto(result.error)
                    stop = result.stop
        except grpc.RpcError:
            if failure:
                raise failure[0] from None
            raise
        return stop

    def read(
        self,
        handle: int,
        span: Span,
        layers: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> Iterator[KvBlock]:
        """K and V of a session's positions, context and tail, as they arrive.

        No `layers` means all that the node holds. Closing the iterator cancels the call.
        """
        request = pb.ReadRequest(handle=handle, layers=layers, span=wire.span_to_proto(span))
        call = self._stub.Read(request, timeout=timeout_s)
        try:
            for response in call:
                yield wire.kv_block_from_proto(response.block)
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None
        finally:
            call.cancel()

    def read_shard(
        self, context_id: str, shard_id: str, capability: bytes, layer: int, start: int
    ) -> Iterator[ShardPart]:
        """A sealed shard for a copy of it: header, samples, K and V from position `start` of
        `layer` on, end. Closing the iterator cancels the call."""
        call = self._stub.ReadShard(
            pb.ReadShardRequest(
                context_id=context_id,
                shard_id=shard_id,
                capability=capability,
                layer=layer,
                start=start,
            )
        )
        try:
            for response in call:
                yield wire.shard_part_from_proto(response)
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None
        finally:
            call.cancel()

    @_raises_longreach_errors
    def attend_once(
        self, layer: int, rows: Sequence[AttendRows], scale: float, softcap: float = 0.0
    ) -> list[AttendResult | LongreachError]:
        """Partial attention of some rows of a layer, outside any stream; for tools and tests."""
        request = pb.AttendOnceRequest(attend=wire.attend_request(1, layer, rows, scale, softcap))
        response = self._stub.AttendOnce(request, timeout=self._timeout_s)
        shapes = [(each.queries.shape[0], each.queries.shape[1]) for each in rows]
        return wire.attend_results_from_proto(response.attend, shapes)

    @_raises_longreach_errors
    def drop(self, context_id: str, capability: bytes) -> int:
        """Forgets a context; returns the bytes freed, indexes included."""
        request = pb.DropRequest(context_id=context_id, capability=capability)
        return self._stub.Drop(request, timeout=self._timeout_s).bytes_freed

    @_raises_longreach_errors
    def drop_shards(self, context_id: str, shard_ids: Sequence[str], capability: bytes) -> int:
        """Forgets some shards of a context; returns the bytes freed."""
        request = pb.DropRequest(
            context_id=context_id, capability=capability, shard_ids=list(shard_ids)
        )
        return self._stub.Drop(request, timeout=self._timeout_s).bytes_freed

    @_raises_longreach_errors
    def inventory(
        self, context_id: str = ""
    ) -> tuple[list[ShardInventory], list[SessionInventory]]:
        """Shards held (of one context, or all) and the sessions open."""
        request = pb.InventoryRequest(context_id=context_id)
        return _inventory(self._stub.Inventory(request, timeout=self._timeout_s))

    @_raises_longreach_errors
    def stats(self) -> NodeStats:
        """Memory and counters."""
        return wire.node_stats_from_proto(
            self._stub.Stats(pb.StatsRequest(), timeout=self._timeout_s)
        )

    def close(self) -> None:
        """Ends the connection and every call on it."""
        self._channel.close()


class AsyncNodeClient:
    """The control methods as coroutines, for the coordinator's event loop."""

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = CONTROL_TIMEOUT_S,
        tls: ChannelTls | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._channel = aio_channel(address, tls=tls)
        self._stub = RetrievalServiceStub(self._channel)

    async def drop(self, context_id: str, capability: bytes) -> int:
        """Forgets a context; returns the bytes freed, indexes included."""
        request = pb.DropRequest(context_id=context_id, capability=capability)
        try:
            return (await self._stub.Drop(request, timeout=self._timeout_s)).bytes_freed
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None

    async def drop_shards(
        self, context_id: str, shard_ids: Sequence[str], capability: bytes
    ) -> int:
        """Forgets some shards of a context; returns the bytes freed."""
        request = pb.DropRequest(
            context_id=context_id, capability=capability, shard_ids=list(shard_ids)
        )
        try:
            return (await self._stub.Drop(request, timeout=self._timeout_s)).bytes_freed
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None

    async def copy(
        self,
        context_id: str,
        shard_id: str,
        source_id: str,
        source_address: str,
        capability: bytes,
    ) -> AsyncIterator[CopyProgress]:
        """Has the node copy a shard from a peer; the last progress is sealed. Closing the iterator
        cancels the copy."""
        call = self._stub.Copy(
            pb.CopyRequest(
                context_id=context_id,
                shard_id=shard_id,
                source_node_id=source_id,
                source_address=source_address,
                capability=capability,
            )
        )
        try:
            async for response in call:
                yield CopyProgress(
                    response.bytes_copied,
                    response.bytes_total,
                    response.sealed,
                    response.checksum,
                )
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None
        finally:
            call.cancel()

    async def close_session(self, session_id: str, capability: bytes, epoch: int = 0) -> int:
        """Ends a session by id, if the node has it and its epoch is not newer than a given one;
        returns the bytes of tail freed."""
        request = pb.CloseSessionRequest(session_id=session_id, capability=capability, epoch=epoch)
        try:
            return (await self._stub.CloseSession(request, timeout=self._timeout_s)).bytes_freed
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None

    async def inventory(
        self, context_id: str = ""
    ) -> tuple[list[ShardInventory], list[SessionInventory]]:
        """Shards held (of one context, or all) and the sessions open."""
        request = pb.InventoryRequest(context_id=context_id)
        try:
            return _inventory(await self._stub.Inventory(request, timeout=self._timeout_s))
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None

    async def stats(self) -> NodeStats:
        """Memory and counters."""
        try:
            response = await self._stub.Stats(pb.StatsRequest(), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None
        return wire.node_stats_from_proto(response)

    async def close(self) -> None:
        """Ends the connection and every call on it."""
        await self._channel.close()


def _inventory(
    response: pb.InventoryResponse,
) -> tuple[list[ShardInventory], list[SessionInventory]]:
    shards = [wire.shard_inventory_from_proto(shard) for shard in response.shards]
    return shards, [wire.session_inventory_from_proto(each) for each in response.sessions]


def _put_requests(
    header: pb.PutHeader,
    parts: Iterable[KvBlock | QuerySample],
    failure: list[BaseException],
) -> Iterator[pb.PutRequest]:
    """The messages of a Put. What `parts` raises is kept: gRPC would only say CANCELLED."""
    yield pb.PutRequest(header=header)
    try:
        for part in parts:
            if isinstance(part, QuerySample):
                yield pb.PutRequest(sample=wire.query_sample_to_proto(part))
            else:
                for block in split_block(part, PUT_PART_BYTES):
                    yield pb.PutRequest(block=wire.kv_block_to_proto(block))
    except Exception as error:
        failure.append(error)
        raise


def _append_requests(
    entries: Iterable[AppendEntry], failure: list[BaseException]
) -> Iterator[pb.AppendRequest]:
    """One message for each entry. What `entries` raise is kept: gRPC would only say CANCELLED."""
    try:
        for number, entry in enumerate(entries, 1):
            yield pb.AppendRequest(request_id=number, entries=[wire.append_entry_to_proto(entry)])
    except Exception as error:
        failure.append(error)
        raise


def split_block(block: KvBlock, part_bytes: int) -> Iterator[KvBlock]:
    """The block in runs of positions of at most `part_bytes` each, or one position."""
    positions = block.keys.shape[2]
    if positions == 0:
        return
    per_position = (block.keys.nbytes + block.values.nbytes) // positions
    step = max(1, part_bytes // max(1, per_position))
    for first in range(0, positions, step):
        run = slice(first, first + step)
        yield KvBlock(
            block.layers,
            block.kv_head_start,
            block.start + first,
            block.keys[:, :, run],
            block.values[:, :, run],
        )
