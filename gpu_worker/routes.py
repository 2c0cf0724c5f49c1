"""Which node serves which positions and heads of a session: a shard map, made ready for rows.

Pure functions. A context that is used up to `context_stop` is served by the shards that begin
before it, clipped to it; the last shard of each (layer, heads) also takes the session's tail.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from longreach.errors import InvalidRequest
from longreach.types import LayerGeometry, Shard, ShardMap, Span

END = 1 << 62
"""Stop of a piece that takes the tail, however long it grows."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions and KV heads of one layer that live together; any of the nodes can answer."""

    shard_id: str
    kv_head_start: int
    kv_head_stop: int
    span: Span
    node_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """Where a session's KV is: `pieces` by layer, `tail_shards` and `addresses` by node."""

    pieces: tuple[tuple[Piece, ...], ...]
    tail_shards: dict[str, tuple[Shard, ...]]
    addresses: dict[str, str]


def plan_route(shard_map: ShardMap, layers: Sequence[LayerGeometry], context_stop: int) -> Route:
    """The route of a session over the first `context_stop` positions of a context.

    Raises InvalidRequest where a layer's positions or heads are not covered exactly once, or a
    node has no address.
    """
    pieces = tuple(_pieces_of(shard_map, layer, context_stop) for layer in layers)
    tails: dict[str, list[Shard]] = defaultdict(list)
    for shard in shard_map.shards:
        ending = tuple(
            layer
            for layer in shard.layers
            if any(p.shard_id == shard.shard_id and p.span.stop == END for p in pieces[layer])
        )
        if ending:
            tail = Shard(
                shard.shard_id,
                Span(context_stop, context_stop),
                ending,
                shard.kv_head_start,
                shard.kv_head_stop,
                shard.node_ids,
            )
            for node_id in shard.node_ids:
                tails[node_id].append(tail)
    used = {node for layer in pieces for piece in layer for node in piece.node_ids}
    missing = sorted(used - set(shard_map.addresses))
    if missing:
        raise InvalidRequest(f"the shard map has no address for {', '.join(missing)}")
    return Route(
        pieces,
        {node: tuple(shards) for node, shards in tails.items()},
        {node: shard_map.addresses[node] for node in sorted(used)},
    )


def _pieces_of(shard_map: ShardMap, layer: LayerGeometry, context_stop: int) -> tuple[Piece, ...]:
    by_heads: dict[tuple[int, int], list[Shard]] = defaultdict(list)
    for shard in shard_map.shards:
        if layer.layer in shard.layers:
            by_heads[shard.kv_head_start, shard.kv_head_stop].append(shard)
    pieces: list[Piece] = []
    next_head = 0
    for (start, stop), shards in sorted(by_heads.items()):
        if start != next_head:
            break
        next_head = stop
        pieces.extend(_pieces_in_order(shards, layer.layer, context_stop))
    if next_head != layer.kv_heads:
        raise InvalidRequest(
            f"the shard map gives layer {layer.layer} KV heads {sorted(by_heads)}; they must cover "
            f"[0, {layer.kv_heads}) exactly once"
        )
    return tuple(pieces)


def _pieces_in_order(shards: list[Shard], layer: int, context_stop: int) -> list[Piece]:
    """Pieces of one layer and one range of heads; together they cover [0, END) exactly once."""
    ordered = sorted(shards, key=lambda shard: (shard.span.start, shard.span.stop))
    used = [shard for shard in ordered if shard.span.start < context_stop] or ordered[:1]
    pieces, reached = [], 0
    for shard in used:
        last = shard is used[-1]
        if shard.span.start != reached or (last and shard.span.stop < context_stop):
            raise InvalidRequest(
                f"shard {shard.shard_id!r} of layer {layer} covers {shard.span}; shards must cover "
                f"[0, {context_stop}) exactly once"
            )
        stop = END if last else shard.span.stop
        reached = shard.span.stop
        pieces.append(
            Piece(
                shard.shard_id,
                shard.kv_head_start,
                shard.kv_head_stop,
                Span(shard.span.start, stop),
                shard.node_ids,
            )
        )
    return pieces
