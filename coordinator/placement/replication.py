"""Further copies of a context's shards, each on a machine of its own where there is one.

A policy places one copy; `replicate` adds the others. Two copies of a shard never share a node.
They share a host, or a zone, only where no other with room is left, and the map's reason says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from coordinator.placement.base import ClusterView, ContextToPlace, NodeView, bytes_by_node
from longreach.types import Shard, ShardMap


def shard_room_bytes(context: ContextToPlace, shard: Shard, index_reserve: float) -> int:
    """Bytes of K, V and indexes that one more copy of a shard takes."""
    one_copy = dataclasses.replace(shard, node_ids=("",))
    return int(bytes_by_node(context, [one_copy])[""] * (1 + index_reserve))


def replicate(
    context: ContextToPlace,
    shard_map: ShardMap,
    view: ClusterView,
    replicas: int,
    index_reserve: float,
) -> ShardMap:
    """The map with up to `replicas` copies of every shard, and why it has fewer where it has.

    A copy goes to the node that shares least with the other holders, then to the one with the
    least so far, then to the next after the first holder, so that copies of several shards spread.
    """
    if replicas < 2:
        return shard_map
    nodes = view.rotated(context.context_id)
    load = {node.node_id: 0 for node in nodes}
    load |= bytes_by_node(context, shard_map.shards)
    free = {
        node.node_id: node.free_bytes - int(load[node.node_id] * (1 + index_reserve))
        for node in nodes
    }
    shards = list(shard_map.shards)
    sizes = [shard_room_bytes(context, shard, index_reserve) for shard in shards]
    # The largest first: a large one that comes last would find all nodes equally full.
    largest_first = sorted(range(len(shards)), key=lambda at: -sizes[at])
    for _ in range(1, replicas):
        for at in largest_first:
            shard, size = shards[at], sizes[at]
            target = next_holder(shard, nodes, free, size, load)
            if target is not None:
                shards[at] = dataclasses.replace(shard, node_ids=(*shard.node_ids, target.node_id))
                free[target.node_id] -= size
                load[target.node_id] += size
    addresses = {node.node_id: node.address for node in nodes}
    used = {node_id for shard in shards for node_id in shard.node_ids}
    return dataclasses.replace(
        shard_map,
        shards=tuple(shards),
        addresses={name: address for name, address in addresses.items() if name in used},
        reason=f"{shard_map.reason}; {_reason(shards, nodes, replicas)}",
    )


def next_holder(
    shard: Shard,
    nodes: Sequence[NodeView],
    free: Mapping[str, int],
    size: int,
    load: Mapping[str, int],
) -> NodeView | None:
    """Where the next copy of a shard goes; None where no node without one has room for it.

    `nodes` holds the holders too, whose hosts and zones it should avoid. `free` and `load` are
    bytes by node, `size` the bytes of one copy.
    """
    names = [node.node_id for node in nodes]
    first = names.index(shard.node_ids[0]) if shard.node_ids and shard.node_ids[0] in names else 0
    in_turn = [*nodes[first:], *nodes[:first]]
    holders = [node for node in nodes if node.node_id in shard.node_ids]
    able = [n for n in in_turn if n.node_id not in shard.node_ids and free[n.node_id] >= size]
    if not able:
        return None
    return min(able, key=lambda node: (closeness(node, holders), load[node.node_id]))


def closeness(node: NodeView, holders: Sequence[NodeView]) -> int:
    """What a node shares with the nearest of some others: 2 the host, 1 the zone, 0 neither."""
    if any(node.host and node.host == other.host for other in holders):
        return 2
    return int(any(node.zone and node.zone == other.zone for other in holders))


def _reason(shards: Sequence[Shard], nodes: Sequence[NodeView], replicas: int) -> str:
    copies = [len(shard.node_ids) for shard in shards]
    by_name = {node.node_id: node for node in nodes}
    near = max(
        closeness(by_name[node_id], [by_name[other] for other in shard.node_ids[:at]])
        for shard in shards
        for at, node_id in enumerate(shard.node_ids)
    )
    text = f"{min(copies)} copies"
    if min(copies) < replicas:
        short = sum(count < replicas for count in copies)
        lack = (
            f"the cluster has {len(nodes)} node{'s' * (len(nodes) > 1)}"
            if len(nodes) < replicas
            else "nodes lack the room"
        )
        text = (
            f"{replicas} copies were asked for and {short} of {len(shards)} shards have fewer "
            f"(at least {min(copies)}): {lack}"
        )
    if min(copies) > 1:
        text += ("", ", some in one zone", ", some on one host")[near]
    return text
