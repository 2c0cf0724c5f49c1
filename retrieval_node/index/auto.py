"""Kind `auto`: the kind that measured fastest for the number of keys.

A build returns an index of the chosen kind, so what reports its kind reports the real one.
"""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from longreach.types import QuerySample
from retrieval_node.index.base import INDEX_KINDS, BuildControl, Index, LayerKv

EXACT_BELOW = 16_384
"""Shards of fewer keys are attended whole, without error and without a build. The sketch takes less
than half of exact attention's time there too, but that is a few tenths of a millisecond."""

PREFERRED = ("sketch", "hnsw")
"""Kinds for longer shards, best first; the first that is registered is taken. From 8K to 1M keys,
structured and hard heads alike, the sketch answered sooner than any graph at every recall, built in
a hundredth of the time and in a quarter of the memory (docs/adr/0003)."""


def kind_for(keys: int) -> str:
    """Name of the kind for a shard of `keys` keys."""
    if keys < EXACT_BELOW:
        return "flat"
    return next(name for name in PREFERRED if name in INDEX_KINDS)


@INDEX_KINDS.register("auto")
class AutoIndex(Index, ABC):
    """Builds an index of another kind, chosen by size."""

    kind: ClassVar[str] = "auto"

    @classmethod
    def build(cls, kv: LayerKv, sample: QuerySample | None, control: BuildControl) -> Index:
        """An index of `kind_for` this many keys."""
        return INDEX_KINDS[kind_for(len(kv.positions))].build(kv, sample, control)
