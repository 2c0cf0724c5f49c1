"""What a placement policy sees and returns.

A policy is a pure function `plan(context, view) -> ShardMap`, registered under its name. A shard
is a rectangle of positions x layers x KV heads, so layers of different shape never share one. The
same policies place the tail of a session without a context: its span is empty and only layers and
heads count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from longreach.errors import ResourceExhausted, Unavailable
from longreach.registry import Registry
from longreach.types import LayerGeometry, Shard, ShardMap, Span


@dataclass(frozen=True, slots=True)
class ContextToPlace:
    """A context (or a session's tail) to place.

    `span` is what the shards cover; `room_tokens` is how many tokens must fit on the nodes (the
    span, or the longest tail); `itemsize` is bytes of one element of K or V.
    """

    context_id: str
    span: Span
    layers: tuple[LayerGeometry, ...]
    itemsize: int
    room_tokens: int

    def token_bytes(self, layer: LayerGeometry, kv_heads: int | None = None) -> int:
        """Bytes of K and V of one token in one layer, for some of its KV heads (all by default)."""
        heads = layer.kv_heads if kv_heads is None else kv_heads
        return heads * (layer.head_dim + layer.value_dim) * self.itemsize

    @property
    def room_bytes(self) -> int:
        """Bytes of K and V that must fit, over all nodes."""
        return self.room_tokens * sum(self.token_bytes(layer) for layer in self.layers)


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node that may hold new KV. `free_bytes` already leaves out what others have reserved;
    `limit_bytes` is all that it may use, 0 where that is not known."""

    node_id: str
    address: str
    cores: int
    free_bytes: int
    host: str = ""
    zone: str = ""
    limit_bytes: int = 0

    @property
    def used_share(self) -> float:
        """Share of its memory in use or promised, in [0, 1]."""
        return self.share_with(0)

    def share_with(self, more_bytes: int) -> float:
        """That share with so many bytes more."""
        used = self.limit_bytes - self.free_bytes + more_bytes
        return used / self.limit_bytes if self.limit_bytes else 1.0


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The nodes, in name order."""

    nodes: tuple[NodeView, ...]

    def rotated(self, context_id: str) -> tuple[NodeView, ...]:
        """The nodes from a start that depends on the context, so that the remainders of several
        contexts, and one layer of several sessions, do not all fall on the same node."""
        if not self.nodes:
            raise Unavailable(
                "no retrieval node is alive; start one with --coordinators pointing here",
                reason="NO_NODES",
            )
        start = int.from_bytes(hashlib.blake2b(context_id.encode(), digest_size=4).digest(), "big")
        start %= len(self.nodes)
        return self.nodes[start:] + self.nodes[:start]


Policy = Callable[[ContextToPlace, ClusterView], ShardMap]
POLICIES: Registry[Policy] = Registry("placement policy")

# One KV head of one layer, the unit that policies hand out.
Cell = tuple[int, int]


def build_shard_map(
    context: ContextToPlace,
    view: ClusterView,
    owners: Mapping[Cell, str],
    policy: str,
    reason: str,
) -> ShardMap:
    """The shard map that gives each cell (layer, KV head) to its owner, in the fewest rectangles.

    A node's heads of one layer form runs; layers with the same shape and the same run share a
    shard.
    """
    shards: list[Shard] = []
    for node in view.nodes:
        layers_of: dict[tuple[int, int, int, int], list[int]] = {}
        for layer in context.layers:
            held = [h for h in range(layer.kv_heads) if owners[layer.layer, h] == node.node_id]
            for start, stop in _runs(held):
                shape = (start, stop, layer.head_dim, layer.value_dim)
                layers_of.setdefault(shape, []).append(layer.layer)
        for (start, stop, _, _), layers in sorted(layers_of.items()):
            shards.append(
                Shard(
                    shard_id=f"s{len(shards)}",
                    span=context.span,
                    layers=tuple(layers),
                    kv_head_start=start,
                    kv_head_stop=stop,
                    node_ids=(node.node_id,),
                )
            )
    used = {shard.node_ids[0] for shard in shards}
    addresses = {node.node_id: node.address for node in view.nodes if node.node_id in used}
    return ShardMap(tuple(shards), addresses, policy, reason)


def bytes_by_node(context: ContextToPlace, shards: Iterable[Shard]) -> dict[str, int]:
    """Bytes of K and V that a map puts on each node."""
    by_number = {layer.layer: layer for layer in context.layers}
    total: dict[str, int] = {}
    given = tuple(shards)
    end = max((shard.span.stop for shard in given), default=0)
    for shard in given:
        if len(context.span):
            tokens = len(shard.span)
        else:  # a tail goes where the last positions are
            tokens = context.room_tokens if shard.span.stop == end else 0
        token = sum(context.token_bytes(by_number[n], shard.kv_heads) for n in shard.layers)
        for node_id in shard.node_ids:
            total[node_id] = total.get(node_id, 0) + token * tokens
    return total


def check_room(
    context: ContextToPlace, shard_map: ShardMap, view: ClusterView, index_reserve: float
) -> None:
    """Raises ResourceExhausted when a node lacks room for its share and an index over it."""
    free = {node.node_id: node.free_bytes for node in view.nodes}
    for node_id, kv_bytes in sorted(bytes_by_node(context, shard_map.shards).items()):
        needed = int(kv_bytes * (1 + index_reserve))
        if needed > free.get(node_id, 0):
            raise ResourceExhausted(
                f"{context.room_tokens} tokens need {needed} bytes on node {node_id} "
                f"({kv_bytes} of K and V, {needed - kv_bytes} for indexes) and it has "
                f"{free.get(node_id, 0)} free; over all {len(view.nodes)} nodes "
                f"{int(context.room_bytes * (1 + index_reserve))} are needed and "
                f"{sum(free.values())} are free: delete contexts, add nodes or raise "
                "--memory-limit-bytes",
                reason="NODE_MEMORY",
            )


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs [start, stop) of ascending numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
