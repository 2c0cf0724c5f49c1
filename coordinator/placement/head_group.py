"""KV heads of every layer split into groups, one group per node, over min(nodes, KV heads) nodes.

Every layer costs a message to each of these nodes, and they work at the same time. Right when a
node has fewer cores than a layer has KV heads.
"""

from __future__ import annotations

from coordinator.placement.base import (
    POLICIES,
    ClusterView,
    ContextToPlace,
    build_shard_map,
)
from longreach.types import ShardMap


@POLICIES.register("head_group")
def plan(context: ContextToPlace, view: ClusterView) -> ShardMap:
    """Splits the KV heads into contiguous groups whose sizes differ by at most one.

    Nodes with the most free memory are taken first, then in an order that depends on the context.
    """
    most_heads = max(layer.kv_heads for layer in context.layers)
    nodes = sorted(view.rotated(context.context_id), key=lambda node: -node.free_bytes)
    nodes = nodes[: min(len(nodes), most_heads)]
    owners: dict[tuple[int, int], str] = {}
    for layer in context.layers:
        groups = min(len(nodes), layer.kv_heads)
        for head in range(layer.kv_heads):
            owners[layer.layer, head] = nodes[head * groups // layer.kv_heads].node_id
    reason = f"{most_heads} KV heads over {len(nodes)} nodes, every layer on all of them"
    return build_shard_map(context, view, owners, "head_group", reason)
