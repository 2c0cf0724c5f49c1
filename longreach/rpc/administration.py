"""What operators ask a coordinator for."""

from __future__ import annotations

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
