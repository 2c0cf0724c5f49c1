"""What KV belongs to, its geometry and where it lives."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from longreach.errors import InvalidRequest
from longreach.types import STORAGE_DTYPES, Identity, LayerGeometry, Shard, ShardMap, Span
from longreach.v1 import common_pb2
from longreach.wire.tensor import CODE_OF_DTYPE, DTYPE_OF_CODE

MAX_LAYERS = 4096
"""Layers a shard or block may name; far above any model."""


def span_to_proto(span: Span) -> common_pb2.Span:
    """Positions [start, stop)."""
    return common_pb2.Span(start=span.start, stop=span.stop)


def span_from_proto(msg: common_pb2.Span, *, name: str = "span") -> Span:
    """Positions [start, stop); raises InvalidRequest unless 0 <= start <= stop."""
    start, stop = msg.start, msg.stop
    if start < 0 or stop < start:
        raise InvalidRequest(f"{name} is [{start}, {stop}); it must have 0 <= start <= stop")
    return Span(start, stop)


def identity_to_proto(identity: Identity) -> common_pb2.Identity:
    """What KV belongs to."""
    code = next((c for c, d in DTYPE_OF_CODE.items() if d.name == identity.dtype), None)
    if code is None:
        raise InvalidRequest(f"identity: dtype {identity.dtype!r} is not one that can be stored")
    return common_pb2.Identity(
        model=identity.model,
        revision=identity.revision,
        dtype=code,  # type: ignore[arg-type]
        rope_regime=identity.rope_regime,
        prefill=identity.prefill,
        tenant=identity.tenant,
    )


def identity_from_proto(msg: common_pb2.Identity) -> Identity:
    """What KV belongs to; raises InvalidRequest on a dtype that is not a storage dtype."""
    dtype = DTYPE_OF_CODE.get(msg.dtype)
    if dtype not in STORAGE_DTYPES:
        known = ", ".join(f"{CODE_OF_DTYPE[d]} ({d.name})" for d in STORAGE_DTYPES)
        raise InvalidRequest(f"identity: dtype number {msg.dtype}; storage dtypes are {known}")
    return Identity(
        model=msg.model,
        revision=msg.revision,
        dtype=dtype.name,
        rope_regime=msg.rope_regime,
        prefill=msg.prefill,
        tenant=msg.tenant,
    )


def geometry_to_proto(geometry: LayerGeometry) -> common_pb2.LayerGeometry:
    """Shape of one layer's attention."""
    return common_pb2.LayerGeometry(
        layer=geometry.layer,
        q_heads=geometry.q_heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        value_dim=geometry.value_dim,
        sliding_window=geometry.sliding_window,
    )


def geometry_from_proto(msg: common_pb2.LayerGeometry) -> LayerGeometry:
    """Shape of one layer's attention; q_heads must be a multiple of kv_heads."""
    if not (msg.kv_heads and msg.head_dim and msg.value_dim) or msg.q_heads % msg.kv_heads:
        raise InvalidRequest(
            f"layer {msg.layer}: q_heads {msg.q_heads}, kv_heads {msg.kv_heads}, head_dim "
            f"{msg.head_dim}, value_dim {msg.value_dim}; all must be positive and q_heads a "
            "multiple of kv_heads"
        )
    return LayerGeometry(
        layer=msg.layer,
        q_heads=msg.q_heads,
        kv_heads=msg.kv_heads,
        head_dim=msg.head_dim,
        value_dim=msg.value_dim,
        sliding_window=msg.sliding_window,
    )


def shard_to_proto(shard: Shard) -> common_pb2.Shard:
    """A rectangle of a context's KV."""
    return common_pb2.Shard(
        shard_id=shard.shard_id,
        span=span_to_proto(shard.span),
        layers=shard.layers,
        kv_head_start=shard.kv_head_start,
        kv_head_stop=shard.kv_head_stop,
        node_ids=shard.node_ids,
    )


def shard_from_proto(msg: common_pb2.Shard) -> Shard:
    """A rectangle of a context's KV: ascending layers and at least one KV head."""
    name = f"shard {msg.shard_id!r}"
    layers = layers_from_proto(msg.layers, name=name)
    if msg.kv_head_stop <= msg.kv_head_start:
        raise InvalidRequest(
            f"{name}: KV heads [{msg.kv_head_start}, {msg.kv_head_stop}) are none; "
            "name at least one"
        )
    return Shard(
        shard_id=msg.shard_id,
        span=span_from_proto(msg.span, name=f"span of {name}"),
        layers=layers,
        kv_head_start=msg.kv_head_start,
        kv_head_stop=msg.kv_head_stop,
        node_ids=tuple(msg.node_ids),
    )


def layers_from_proto(layers: Iterable[int], *, name: str) -> tuple[int, ...]:
    """Layer numbers, ascending and bounded in number."""
    numbers = tuple(layers)
    if len(numbers) > MAX_LAYERS or any(a >= b for a, b in itertools.pairwise(numbers)):
        raise InvalidRequest(
            f"{name}: {len(numbers)} layers {list(numbers[:8])}; they must ascend and number at "
            f"most {MAX_LAYERS}"
        )
    return numbers


def shard_map_to_proto(shard_map: ShardMap) -> common_pb2.ShardMap:
    """Where a context lives."""
    return common_pb2.ShardMap(
        shards=[shard_to_proto(shard) for shard in shard_map.shards],
        nodes=[
            common_pb2.NodeAddress(node_id=node_id, address=address)
            for node_id, address in shard_map.addresses.items()
        ],
        policy=shard_map.policy,
        reason=shard_map.reason,
        epoch=shard_map.epoch,
    )


def shard_map_from_proto(msg: common_pb2.ShardMap) -> ShardMap:
    """Where a context lives; every node named in a shard has an address."""
    shard_map = ShardMap(
        shards=tuple(shard_from_proto(shard) for shard in msg.shards),
        addresses={node.node_id: node.address for node in msg.nodes},
        policy=msg.policy,
        reason=msg.reason,
        epoch=msg.epoch or 1,
    )
    for shard in shard_map.shards:
        for node_id in shard.node_ids:
            if node_id not in shard_map.addresses:
                raise InvalidRequest(
                    f"shard {shard.shard_id!r} is placed on node {node_id!r}, which has no address"
                )
    return shard_map
