"""What placement sees of the cluster: nodes with the memory that is really free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.cluster import Cluster, Member
from coordinator.placement.base import ClusterView, NodeView


@dataclass(slots=True)
class Promise:
    """Bytes that a context being stored will take on each node, and how much is there already."""

    bytes_by_node: dict[str, int]
    stored_fraction: float = 0.0

    def outstanding(self, node_id: str) -> int:
        """Bytes still to come on a node."""
        return int(self.bytes_by_node.get(node_id, 0) * (1 - self.stored_fraction))


class Refusals:
    """What contexts lacked that were refused for want of memory, until somebody takes note."""

    def __init__(self) -> None:
        self._bytes = 0

    def note(self, needed_bytes: int, view: ClusterView) -> None:
        """A context that needs so much did not fit on the nodes; at least one byte was lacking,
        since what is free may be spread too thin."""
        free_bytes = sum(node.free_bytes for node in view.nodes)
        self._bytes = max(self._bytes, needed_bytes - free_bytes, 1)

    def take(self) -> int:
        """Bytes that the largest of them lacked since this was last called."""
        taken, self._bytes = self._bytes, 0
        return taken


def cluster_view(cluster: Cluster, promises: Iterable[Promise]) -> ClusterView:
    """The nodes that are alive, with what they report free less what others were promised."""
    kept = list(promises)
    return ClusterView(tuple(_node_view(member, kept) for member in cluster.nodes()))


def _node_view(member: Member, promises: list[Promise]) -> NodeView:
    stats = member.report.node
    assert stats is not None
    used = stats.context_bytes + stats.index_bytes + stats.tail_bytes
    promised = sum(promise.outstanding(member.member_id) for promise in promises)
    return NodeView(
        node_id=member.member_id,
        address=member.report.address,
        cores=member.report.cores,
        free_bytes=max(0, stats.memory_limit_bytes - used - promised),
        host=member.report.host,
        zone=member.report.zone,
        limit_bytes=stats.memory_limit_bytes,
    )
