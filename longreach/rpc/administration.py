"""What operators ask a coordinator for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grpc

from longreach.rpc.channels import sync_channel
from longreach.rpc.status import error_from_rpc
from longreach.rpc.tls import ChannelTls
from longreach.v1 import cluster_pb2 as pb
from longreach.v1.cluster_pb2_grpc import ClusterServiceStub

REBUILD_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class RebuildReport:
    """What a rebuild of the catalog did.

    `found` are the contexts that it lacked, `contexts` counts those it has now; `silent` nodes are
    known and did not answer, so that what only they hold was not found.
    """

    found: tuple[str, ...]
    contexts: int
    answered: tuple[str, ...]
    silent: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DrainReport:
    """How far a node has been emptied: shards and bytes of K and V that the maps still place there,
    and sessions open there. `stuck`: no other node can take what is left."""

    shards_left: int
    bytes_left: int
    sessions: int
    stuck: bool


def drain_node(
    address: str, node_id: str, *, tls: ChannelTls | None = None, timeout_s: float | None = None
) -> Iterator[DrainReport]:
    """Has a node emptied, for `timeout_s` or as long as it takes; what is left, as it shrinks."""
    with sync_channel(address, tls=tls) as channel:
        request = pb.DrainNodeRequest(node_id=node_id, timeout_s=timeout_s or 0.0)
        try:
            for reply in ClusterServiceStub(channel).DrainNode(request):
                yield DrainReport(reply.shards_left, reply.bytes_left, reply.sessions, reply.stuck)
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=address) from None


def rebuild_catalog(
    address: str, *, tls: ChannelTls | None = None, timeout_s: float | None = None
) -> RebuildReport:
    """Has the coordinator at `address` restore the catalog from the nodes' inventories."""
    with sync_channel(address, tls=tls) as channel:
        stub = ClusterServiceStub(channel)
        try:
            reply = stub.RebuildCatalog(
                pb.RebuildCatalogRequest(), timeout=timeout_s or REBUILD_TIMEOUT_S
            )
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=address) from None
    return RebuildReport(
        tuple(reply.found_context_ids),
        reply.contexts,
        tuple(reply.node_ids),
        tuple(reply.silent_node_ids),
    )
