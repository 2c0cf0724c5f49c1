"""Gives a node the positions of a session's tail that it misses, read from nodes that have them.

So a session whose node was lost, or came back without its memory, has as many copies of its tail
again as its context has. Runs before the session's first row under its new epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gpu_worker.appends import NewTokens, blocks_of
from longreach.types import (
    AppendEntry,
    LayerGeometry,
    SessionRecord,
    Shard,
    Span,
    StorageArray,
)

COPY_TOKENS = 256
"""Positions in one message, all layers of the node together."""

ReadSpan = Callable[[Sequence[int], Span], dict[int, tuple[StorageArray, StorageArray]]]
"""Keys [kv_heads, n, head_dim] and values of some layers over a span, from nodes that have it."""


def copied_entries(
    record: SessionRecord,
    missing: Span,
    handle: int,
    shards: Sequence[Shard],
    layers: Sequence[LayerGeometry],
    read: ReadSpan,
) -> Iterator[AppendEntry]:
    """What a node must be sent to hold `missing`, whose token ids the record knows; read as the
    iterator advances."""
    kept = sorted({layer for shard in shards for layer in shard.layers})
    for start in range(missing.start, missing.stop, COPY_TOKENS):
        span = Span(start, min(start + COPY_TOKENS, missing.stop))
        found = read(kept, span)
        kv = [found.get(layer.layer) for layer in layers]
        first = span.start - record.context_stop
        ids = record.known_ids[first : first + len(span)]
        new = NewTokens(record.session_id, span.start, ids, kv, slice(None))  # type: ignore[arg-type]
        blocks = tuple(block for shard in shards for block in blocks_of(layers, shard, new))
        yield AppendEntry(handle, record.epoch, span.start, ids, blocks)
