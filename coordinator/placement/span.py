"""Runs of positions over the nodes: a run on one node, or layer by layer where none has the room.

A layer costs as many messages as there are runs; but a context that no other policy fits may fit
so, and where every copy of a run is lost, only that run is computed again. A rule of the budget
that counts keys counts them in every run: `top_k=100` over four runs attends up to 400 keys. Rules
of mass and range do not depend on the number of runs where the row carries a threshold.
"""

from __future__ import annotations

import dataclasses
import itertools

from coordinator.placement.base import (
    POLICIES,
    ClusterView,
    ContextToPlace,
    build_shard_map,
    bytes_by_node,
    check_room,
)
from coordinator.placement.layer import plan as plan_layers
from longreach.errors import ResourceExhausted
from longreach.types import Shard, ShardMap, Span

ALIGNED_TOKENS = 128
"""Runs begin at multiples of this, so that a run can be prefilled again in the same chunks."""
MOST_RUNS = 64


@POLICIES.register("span")
def plan(context: ContextToPlace, view: ClusterView) -> ShardMap:
    """As many runs as nodes, or more where only more fit, as far as runs can be that short."""
    runs = max(2, len(view.nodes))
    shard_map = plan_runs(context, view, runs)
    while runs < MOST_RUNS and not _fits(context, shard_map, view):
        runs *= 2
        shard_map = plan_runs(context, view, runs)
    return shard_map


def plan_runs(context: ContextToPlace, view: ClusterView, runs: int) -> ShardMap:
    """The context in so many runs of about equal length, each on what the runs before it left free.
    The tail of a session has no positions yet and one run."""
    shards: list[Shard] = []
    addresses: dict[str, str] = {}
    free = {node.node_id: node.free_bytes for node in view.nodes}
    spans = _cut(context.span, runs)
    for number, span in enumerate(spans):
        left = ClusterView(
            tuple(dataclasses.replace(n, free_bytes=free[n.node_id]) for n in view.nodes)
        )
        part = dataclasses.replace(
            context,
            # Another start for each run, so that a layer's runs are on different nodes.
            context_id=f"{context.context_id}/{number}",
            span=span,
            room_tokens=len(span) if len(context.span) else context.room_tokens,
        )
        placed = _on_one_node(part, left) or plan_layers(part, left)
        for node_id, used in bytes_by_node(part, placed.shards).items():
            free[node_id] -= used
        addresses |= placed.addresses
        shards += placed.shards
    named = tuple(dataclasses.replace(shard, shard_id=f"s{at}") for at, shard in enumerate(shards))
    reason = (
        f"{len(spans)} runs of about {len(spans[0]):,} positions over {len(view.nodes)} nodes; a "
        "rule that counts keys counts them in each run"
    )
    return ShardMap(named, addresses, "span", reason)


def _on_one_node(part: ContextToPlace, view: ClusterView) -> ShardMap | None:
    """A run on the node with the most room, if it has enough."""
    roomiest = max(view.rotated(part.context_id), key=lambda node: node.free_bytes)
    if roomiest.free_bytes < part.room_bytes:
        return None
    owners = {
        (layer.layer, head): roomiest.node_id
        for layer in part.layers
        for head in range(layer.kv_heads)
    }
    return build_shard_map(part, view, owners, "span", "")


def _cut(span: Span, runs: int) -> list[Span]:
    """About equal parts of a span that begin at multiples of ALIGNED_TOKENS, none empty."""
    inner = [
        (span.start + len(span) * at // runs) // ALIGNED_TOKENS * ALIGNED_TOKENS
        for at in range(1, runs)
    ]
    edges = sorted({span.start, *(at for at in inner if span.start < at < span.stop), span.stop})
    return [Span(a, b) for a, b in itertools.pairwise(edges)] or [span]


def _fits(context: ContextToPlace, shard_map: ShardMap, view: ClusterView) -> bool:
    try:
        check_room(context, shard_map, view, 0.0)
    except ResourceExhausted:
        return False
    return True
