"""The gRPC face of a retrieval node: decode, call the store, encode. Nothing else."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from longreach import telemetry, wire
from longreach.errors import Internal, InvalidRequest, LongreachError
from longreach.rpc.authorization import Authorization, Policy
from longreach.rpc.channels import server_options
from longreach.rpc.health import Readiness, serve_health
from longreach.rpc.retrieval import NodeClient
from longreach.rpc.status import map_errors
from longreach.rpc.tls import ChannelTls, open_port
from longreach.security.peers import PeerIdentity, Role
from longreach.security.tls import TlsFiles
from longreach.telemetry import scope, tracing
from longreach.types import AttendResult, AttendRows
from longreach.v1 import retrieval_pb2 as pb
from longreach.v1.retrieval_pb2_grpc import (
    RetrievalServiceServicer,
    add_RetrievalServiceServicer_to_server,
)
from retrieval_node.attend import Attended
from retrieval_node.attend_trace import attend_attributes
from retrieval_node.copying import Bandwidth, Copier
from retrieval_node.store import PutStream, Store

_LOG = logging.getLogger(__name__)
_ATTEND_SECONDS = telemetry.histogram("attend_seconds").bind()
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["RetrievalService"].full_name
POLICY = Policy(
    {
        SERVICE_NAME: frozenset({Role.WORKER, Role.COORDINATOR}),
        f"{SERVICE_NAME}/ReadShard": frozenset({Role.NODE, Role.WORKER}),
        f"{SERVICE_NAME}/Copy": frozenset({Role.COORDINATOR}),
    }
)
"""Who may call a node where TLS is on."""


class RetrievalServer(RetrievalServiceServicer):
    """Answers the RPCs of a node from its store."""

    def __init__(self, store: Store, copier: Copier) -> None:
        self._store = store
        self._copier = copier

    @map_errors
    def Put(  # noqa: N802
        self, request_iterator: Iterator[pb.PutRequest], context: grpc.ServicerContext
    ) -> pb.PutResponse:
        """A header, then blocks and samples in any order."""
        first = next(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidRequest("a Put begins with a header that names the shard")
        with (
            scope.entered(context_id=first.header.context_id),
            self._begin_put(first.header) as put,
        ):
            for message in request_iterator:
                part = message.WhichOneof("part")
                if part == "block":
                    put.write(wire.kv_block_from_proto(message.block))
                elif part == "sample":
                    put.add_sample(wire.query_sample_from_proto(message.sample))
                else:
                    raise InvalidRequest(f"a Put goes on with blocks and samples, not {part}")
            return pb.PutResponse(bytes_stored=put.bytes_stored)

    def _begin_put(self, header: pb.PutHeader) -> PutStream:
        return self._store.put(
            header.context_id,
            wire.shard_from_proto(header.shard),
            wire.identity_from_proto(header.identity),
            [wire.geometry_from_proto(each) for each in header.layers],
            header.capability,
        )

    @map_errors
    def Seal(self, request: pb.SealRequest, context: grpc.ServicerContext) -> pb.SealResponse:  # noqa: N802
        """Makes a shard immutable and visible."""
        token_ids = wire.tensor_from_proto(
            request.token_ids, name="token_ids [span]", shape=(None,), dtype=np.dtype("<i4")
        )
        with scope.entered(context_id=request.context_id):
            checksum, stored = self._store.seal(
                request.context_id, request.shard_id, request.capability, token_ids
            )
        return pb.SealResponse(checksum=checksum, bytes_stored=stored)

    @map_errors
    def OpenSession(  # noqa: N802
        self, request: pb.OpenSessionRequest, context: grpc.ServicerContext
    ) -> pb.OpenSessionResponse:
        """Opens, reopens or takes over a session."""
        record = wire.session_record_from_proto(request.record)
        with scope.entered(session_id=record.session_id, context_id=record.context_id):
            handle, stop = self._store.open_session(
                request.capability,
                record,
                wire.identity_from_proto(request.identity),
                [wire.shard_from_proto(each) for each in request.tail_shards],
                [wire.geometry_from_proto(each) for each in request.layers],
            )
        return pb.OpenSessionResponse(handle=handle, stop=stop)

    @map_errors
    def CloseSession(  # noqa: N802
        self, request: pb.CloseSessionRequest, context: grpc.ServicerContext
    ) -> pb.CloseSessionResponse:
        """Ends a session."""
        if request.session_id:
            freed = self._store.close_session_id(
                request.session_id, request.capability, request.epoch
            )
        else:
            freed = self._store.close_session(request.handle)
        return pb.CloseSessionResponse(bytes_freed=freed)

    @map_errors
    def Attend(  # noqa: N802
        self, request_iterator: Iterator[pb.AttendRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AttendResponse]:
        """Answers each message in turn; a bad one is refused and the stream goes on."""
        for request in request_iterator:
            yield self._attend(request)

    @map_errors
    def AttendOnce(  # noqa: N802
        self, request: pb.AttendOnceRequest, context: grpc.ServicerContext
    ) -> pb.AttendOnceResponse:
        """The same for one message."""
        return pb.AttendOnceResponse(attend=self._attend(request.attend))

    def _attend(self, request: pb.AttendRequest) -> pb.AttendResponse:
        began = time.perf_counter()
        try:
            return self._answered(request, began)
        except Exception as error:
            refusal = wire.error_to_proto(_refusal(error, "Attend"))
            return pb.AttendResponse(request_id=request.request_id, error=refusal)
        finally:
            _ATTEND_SECONDS.record(time.perf_counter() - began)

    def _answered(self, request: pb.AttendRequest, began: float) -> pb.AttendResponse:
        rows = wire.attend_rows_from_proto(request)
        if not request.traceparent:
            attended = self._store.attend(request.layer, rows, request.scale, request.softcap)
            return _attend_response(request.request_id, rows, attended, began)
        with tracing.part("attend", request.traceparent) as span:
            attended = self._store.attend(request.layer, rows, request.scale, request.softcap)
            if span is not None:
                span.set(attend_attributes(request.layer, attended))
            return _attend_response(request.request_id, rows, attended, began)

    @map_errors
    def Append(  # noqa: N802
        self, request_iterator: Iterator[pb.AppendRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.AppendResponse]:
        """Stores each message's entries in order; a bad entry is refused and the stream goes on."""
        for request in request_iterator:
            results = [self._append(entry) for entry in request.entries]
            yield pb.AppendResponse(request_id=request.request_id, results=results)

    def _append(self, message: pb.AppendEntry) -> pb.AppendResult:
        try:
            stop, refused = self._store.append(wire.append_entry_from_proto(message))
        except Exception as error:
            stop, refused = 0, _refusal(error, "Append")
        return pb.AppendResult(
            handle=message.handle,
            stop=stop,
            error=None if refused is None else wire.error_to_proto(refused),
        )

    @map_errors
    def Read(  # noqa: N802
        self, request: pb.ReadRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ReadResponse]:
        """Streams K and V of a session."""
        span = wire.span_from_proto(request.span, name="span")
        for block in self._store.read(request.handle, span, list(request.layers)):
            yield pb.ReadResponse(block=wire.kv_block_to_proto(block))

    @map_errors
    def Copy(  # noqa: N802
        self, request: pb.CopyRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.CopyResponse]:
        """Copies a shard from a peer."""
        for progress in self._copier.copy(
            request.context_id,
            request.shard_id,
            request.capability,
            request.source_node_id,
            request.source_address,
            _cancellation(context),
        ):
            yield pb.CopyResponse(
                bytes_copied=progress.bytes_copied,
                bytes_total=progress.bytes_total,
                sealed=progress.sealed,
                checksum=progress.checksum,
            )

    @map_errors
    def ReadShard(  # noqa: N802
        self, request: pb.ReadShardRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ReadShardResponse]:
        """Streams a sealed shard to a peer."""
        for part in self._copier.read_shard(
            request.context_id,
            request.shard_id,
            request.capability,
            request.layer,
            request.start,
            _cancellation(context),
        ):
            yield wire.shard_part_to_proto(part)

    @map_errors
    def Drop(self, request: pb.DropRequest, context: grpc.ServicerContext) -> pb.DropResponse:  # noqa: N802
        """Forgets a context, or some of its shards."""
        if request.shard_ids:
            freed = self._store.drop_shards(
                request.context_id, list(request.shard_ids), request.capability
            )
            return pb.DropResponse(bytes_freed=freed)
        return pb.DropResponse(bytes_freed=self._store.drop(request.context_id, request.capability))

    @map_errors
    def Inventory(  # noqa: N802
        self, request: pb.InventoryRequest, context: grpc.ServicerContext
    ) -> pb.InventoryResponse:
        """Everything the node holds."""
        shards, sessions = self._store.inventory(request.context_id)
        return pb.InventoryResponse(
            shards=[wire.shard_inventory_to_proto(each) for each in shards],
            session_ids=[each.session_id for each in sessions],
            sessions=[wire.session_inventory_to_proto(each) for each in sessions],
        )

    @map_errors
    def Stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> pb.StatsResponse:  # noqa: N802
        """Memory and counters."""
        return wire.node_stats_to_proto(self._store.stats())


def _peer(files: TlsFiles | None, node_id: str, address: str) -> NodeClient:
    """A client of another node, whose certificate must name it."""
    server_name = PeerIdentity(Role.NODE, node_id).server_name
    return NodeClient(address, tls=ChannelTls(files, lambda _: server_name) if files else None)


def _cancellation(context: grpc.ServicerContext) -> threading.Event:
    """Set when the call has ended, however it ended."""
    ended = threading.Event()
    if not context.add_callback(ended.set):
        ended.set()
    return ended


def _attend_response(
    request_id: int, rows: Sequence[AttendRows], attended: Attended, began: float
) -> pb.AttendResponse:
    """The reply; rows that failed take the value size of the others, which share their layer."""
    value_dim = next(
        (r.partial.output.shape[-1] for r in attended.results if isinstance(r, AttendResult)), 0
    )
    shapes = [(*each.queries.shape[:2], value_dim) for each in rows]
    work_s = attended.search_s + attended.attend_s
    # queue_s stays 0: the stream's own thread takes a message as soon as it is there.
    timing = wire.NodeTiming(
        search_s=attended.search_s,
        attend_s=attended.attend_s,
        merge_s=max(0.0, time.perf_counter() - began - work_s),
    )
    return wire.attend_response(request_id, attended.results, shapes, timing)


def _refusal(error: Exception, method: str) -> LongreachError:
    """What a peer is told: deliberate errors as they are, others without their text."""
    if isinstance(error, LongreachError):
        return error
    _LOG.error("%s failed", method, exc_info=error)
    return Internal(f"{method} failed with {type(error).__name__}; the trace is in the node's log")


def start_server(
    store: Store,
    listen: str,
    max_streams: int,
    files: TlsFiles | None = None,
    health_listen: str = "",
    copy_bytes_per_s: int = 0,
) -> tuple[grpc.Server, str, Readiness]:
    """Starts to answer on `listen`; returns the server, its address and the readiness switch.

    With `files` by mutual TLS, and health checks in plain text on `health_listen` if given.
    `copy_bytes_per_s` limits copies from and to other nodes; 0 does not.

    An open stream pins a thread, so there are as many threads as RPCs are allowed at once; one
    more is refused with RESOURCE_EXHAUSTED instead of waiting.
    """
    pool = ThreadPoolExecutor(max_streams, thread_name_prefix="rpc")
    server = grpc.server(
        pool,
        interceptors=[Authorization(POLICY)] if files else [],
        options=server_options(),
        maximum_concurrent_rpcs=max_streams,
    )
    copier = Copier(store, Bandwidth(copy_bytes_per_s), functools.partial(_peer, files))
    add_RetrievalServiceServicer_to_server(RetrievalServer(store, copier), server)
    readiness = serve_health(server, [SERVICE_NAME])
    address = open_port(server, listen, files)
    if files and health_listen:
        open_port(server, health_listen, None)
    server.start()
    return server, address, readiness
