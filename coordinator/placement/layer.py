"""A layer's KV heads all on one node, layers spread over the nodes.

One message per layer and decode step. Right when a node has at least as many cores as a layer has
KV heads, since the heads of a layer are then searched at the same time.
"""

from __future__ import annotations

from coordinator.placement.base import (
    POLICIES,
    ClusterView,
    ContextToPlace,
    build_shard_map,
)
from longreach.types import LayerGeometry, ShardMap


@POLICIES.register("layer")
def plan(context: ContextToPlace, view: ClusterView) -> ShardMap:
    """Gives each layer to the node with the least so far, among those with room for it.

    Layers that are searched and sliding-window layers, which are only stored, are balanced apart:
    the first cost time in each step, the second only memory.
    """
    nodes = view.rotated(context.context_id)
    free = {node.node_id: node.free_bytes for node in nodes}
    owners: dict[tuple[int, int], str] = {}
    for searched in (True, False):
        load = dict.fromkeys(free, 0)
        for layer in context.layers:
            if (layer.sliding_window == 0) is not searched:
                continue
            size = context.token_bytes(layer)
            owner = _least_loaded(load, free, size * context.room_tokens)
            load[owner] += size
            free[owner] -= size * context.room_tokens
            owners.update({(layer.layer, head): owner for head in range(layer.kv_heads)})
    return build_shard_map(context, view, owners, "layer", _reason(context.layers, len(nodes)))


def _least_loaded(load: dict[str, int], free: dict[str, int], size: int) -> str:
    """The node with the least load that has room; when none has, simply the least loaded, and
    the planner says what is missing."""
    roomy = [node_id for node_id in load if free[node_id] >= size] or list(load)
    return min(roomy, key=lambda node_id: load[node_id])


def _reason(layers: tuple[LayerGeometry, ...], nodes: int) -> str:
    return f"{len(layers)} layers over {nodes} nodes, all KV heads of a layer on one node"
