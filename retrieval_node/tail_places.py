"""Which layers and KV heads of a session's tail a node keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from longreach.errors import InvalidRequest
from longreach.types import LayerGeometry, Shard
from retrieval_node.shard import check_geometry


@dataclass(frozen=True, slots=True)
class TailPlace:
    """KV heads [kv_head_start, kv_head_stop) of a layer, whose tail a node keeps."""

    geometry: LayerGeometry
    kv_head_start: int
    kv_head_stop: int

    @property
    def heads(self) -> int:
        """Number of KV heads."""
        return self.kv_head_stop - self.kv_head_start


def tail_places(
    shards: Sequence[Shard], geometry: Sequence[LayerGeometry]
) -> tuple[TailPlace, ...]:
    """What the shards of a node ask it to keep of a tail; spans are ignored, repeats are one."""
    places: dict[tuple[int, int, int], TailPlace] = {}
    for shard in shards:
        for layer, each in check_geometry(shard, geometry).items():
            key = (layer, shard.kv_head_start, shard.kv_head_stop)
            places[key] = TailPlace(each, shard.kv_head_start, shard.kv_head_stop)
    ordered = [places[key] for key in sorted(places)]
    for one, other in pairwise(ordered):
        if one.geometry.layer == other.geometry.layer and one.kv_head_stop > other.kv_head_start:
            raise InvalidRequest(
                f"tail shards overlap: layer {one.geometry.layer} KV heads [{one.kv_head_start}, "
                f"{one.kv_head_stop}) and [{other.kv_head_start}, {other.kv_head_stop}); a "
                "position would be attended twice"
            )
    return tuple(ordered)
