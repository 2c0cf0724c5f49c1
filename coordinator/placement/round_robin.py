"""Each (layer, KV head) to the next node in turn: the finest spread, and the plainest baseline."""

from __future__ import annotations

from coordinator.placement.base import (
    POLICIES,
    ClusterView,
    ContextToPlace,
    build_shard_map,
)
from longreach.types import ShardMap


@POLICIES.register("round_robin")
def plan(context: ContextToPlace, view: ClusterView) -> ShardMap:
    """Deals the cells out like cards."""
    nodes = view.rotated(context.context_id)
    cells = [(layer.layer, head) for layer in context.layers for head in range(layer.kv_heads)]
    owners = {cell: nodes[i % len(nodes)].node_id for i, cell in enumerate(cells)}
    reason = f"{len(cells)} (layer, KV head) pairs dealt over {len(nodes)} nodes"
    return build_shard_map(context, view, owners, "round_robin", reason)
