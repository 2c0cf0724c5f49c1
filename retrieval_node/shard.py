"""A sealed shard: K and V that never change, with their checksum; and how shards are laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longreach.errors import FailedPrecondition, InvalidRequest
from longreach.types import (
    Identity,
    KvBlock,
    LayerGeometry,
    Shard,
    Span,
    storage_dtype,
)
from retrieval_node.aligned import aligned_empty
from retrieval_node.index.base import LayerKv
from retrieval_node.integrity import kv_checksum, same_bytes

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SealedShard:
    """A complete shard. Its arrays are read-only; nothing about it ever changes.

    `layers` maps layer number to K and V; `token_ids` [span].
    """

    context_id: str
    shard: Shard
    identity: Identity
    geometry: Mapping[int, LayerGeometry]
    layers: Mapping[int, LayerKv]
    token_ids: TokenIds
    checksum: int

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return sum(kv.keys.nbytes + kv.values.nbytes for kv in self.layers.values())

    @property
    def searched_layers(self) -> tuple[int, ...]:
        """Layers that are indexed and attended: all but sliding-window ones."""
        return tuple(n for n in self.shard.layers if not self.geometry[n].sliding_window)

    def check_same(self, block: KvBlock) -> None:
        """Raises FailedPrecondition unless the shard holds the block's bytes already."""
        span, first = block.span, block.kv_head_start - self.shard.kv_head_start
        heads = slice(first, first + block.keys.shape[1])
        rows = slice(span.start - self.shard.span.start, span.stop - self.shard.span.start)
        inside = first >= 0 and span.intersect(self.shard.span) == span
        for axis, layer in enumerate(block.layers):
            kv = self.layers.get(layer)
            if not (
                inside
                and kv is not None
                and same_bytes(kv.keys[heads, rows], block.keys[axis])
                and same_bytes(kv.values[heads, rows], block.values[axis])
            ):
                raise FailedPrecondition(
                    f"shard {self.shard.shard_id!r} of context {self.context_id!r} is sealed and "
                    f"does not hold these bytes for layer {layer}, positions {span}; drop the "
                    "context to put another in its place",
                    reason="SHARD_SEALED",
                )

    def check_tokens(self, span: Span, token_ids: TokenIds) -> None:
        """Raises FailedPrecondition where `token_ids` of `span` differ from the shard's."""
        own = self.shard.span
        both = own.intersect(span)
        mine = self.token_ids[both.start - own.start : both.stop - own.start]
        theirs = token_ids[both.start - span.start : both.stop - span.start]
        if not np.array_equal(mine, theirs):
            raise FailedPrecondition(
                f"token ids of {both} differ from those of sealed shard "
                f"{self.shard.shard_id!r} of context {self.context_id!r}; a context is one token "
                "sequence",
                reason="TOKEN_MISMATCH",
            )


def sealed_shard(
    context_id: str,
    shard: Shard,
    identity: Identity,
    geometry: Mapping[int, LayerGeometry],
    layers: Mapping[int, LayerKv],
    token_ids: TokenIds,
) -> SealedShard:
    """Checksums complete arrays and makes them read-only."""
    for kv in layers.values():
        kv.keys.flags.writeable = False
        kv.values.flags.writeable = False
    token_ids = np.array(token_ids, np.int32)
    token_ids.flags.writeable = False
    checksum = kv_checksum(layers[layer] for layer in shard.layers)
    return SealedShard(
        context_id, shard, identity, dict(geometry), dict(layers), token_ids, checksum
    )


def allocate_layers(
    shard: Shard, geometry: Mapping[int, LayerGeometry], dtype: np.dtype[np.generic]
) -> dict[int, LayerKv]:
    """Uninitialised arrays for every layer of a shard.

    NumPy asks the kernel for huge pages where an array is large, which halves the cost of a gather.
    """
    shape = (shard.kv_heads, len(shard.span))
    return {
        layer: LayerKv(
            aligned_empty((*shape, geometry[layer].head_dim), dtype),
            aligned_empty((*shape, geometry[layer].value_dim), dtype),
            shard.span.start,
        )
        for layer in shard.layers
    }


def shard_bytes(shard: Shard, geometry: Mapping[int, LayerGeometry], dtype_name: str) -> int:
    """Bytes of K, V and token ids of a shard, before anything is allocated."""
    itemsize = storage_dtype(dtype_name).itemsize
    row = sum(geometry[n].head_dim + geometry[n].value_dim for n in shard.layers)
    return len(shard.span) * (shard.kv_heads * row * itemsize + np.dtype(np.int32).itemsize)


def check_geometry(shard: Shard, layers: Sequence[LayerGeometry]) -> dict[int, LayerGeometry]:
    """Geometry by layer of the shard's layers; raises InvalidRequest when they do not agree."""
    geometry = {each.layer: each for each in layers}
    missing = [layer for layer in shard.layers if layer not in geometry]
    if missing or not shard.layers or len(set(shard.layers)) != len(shard.layers):
        raise InvalidRequest(
            f"shard {shard.shard_id!r} has layers {list(shard.layers)} and geometry for "
            f"{sorted(geometry)}; name each layer once and give the geometry of each"
        )
    for layer in shard.layers:
        each = geometry[layer]
        sizes = (each.q_heads, each.kv_heads, each.head_dim, each.value_dim)
        if min(sizes) < 1 or each.q_heads % each.kv_heads:
            raise InvalidRequest(
                f"geometry of layer {layer} is q_heads {each.q_heads}, kv_heads {each.kv_heads}, "
                f"head_dim {each.head_dim}, value_dim {each.value_dim}; all must be positive and "
                "kv_heads must divide q_heads"
            )
        if not 0 <= shard.kv_head_start < shard.kv_head_stop <= each.kv_heads:
            raise InvalidRequest(
                f"shard {shard.shard_id!r} has KV heads [{shard.kv_head_start}, "
                f"{shard.kv_head_stop}); layer {layer} has {each.kv_heads}"
            )
    return {layer: geometry[layer] for layer in shard.layers}
