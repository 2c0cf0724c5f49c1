"""Read: K and V of a session, from its context's shards and its tail, in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longreach.errors import NotFound
from longreach.types import KvBlock, Span
from retrieval_node.contexts import Context
from retrieval_node.index.base import LayerKv
from retrieval_node.sessions import Session

BLOCK_BYTES = 4 << 20
"""Blocks hold at most about this many bytes, well below a message's limit."""


def read_blocks(
    session: Session, context: Context | None, span: Span, layers: Sequence[int]
) -> Iterator[KvBlock]:
    """Blocks of one layer each, layers ascending, positions ascending within a source.

    What the node does not hold is left out: the reader knows from the shard map what must come and
    checks that it did. Raises NotFound for a layer of which the node holds nothing.
    """
    held = set(session.geometry) | set(context.by_layer if context else ())
    unknown = sorted(set(layers) - held)
    if unknown:
        raise NotFound(
            f"the node holds nothing of layers {unknown} for session "
            f"{session.record.session_id!r}; it has {sorted(held)}",
            reason="UNKNOWN_LAYER",
        )
    of_context = span.intersect(Span(0, session.record.context_stop))
    for layer in sorted(layers or held):
        for served in context.by_layer.get(layer, ()) if context else ():
            sealed = served.sealed
            yield from cut_blocks(
                layer, sealed.layers[layer], sealed.shard.kv_head_start, of_context
            )
        for piece in session.tail_view(layer):
            yield from cut_blocks(layer, piece.kv, piece.place.kv_head_start, span)


def cut_blocks(layer: int, kv: LayerKv, kv_head_start: int, span: Span) -> Iterator[KvBlock]:
    """The positions of `span` that a layer's arrays hold, in blocks of about BLOCK_BYTES."""
    wanted = span.intersect(kv.positions)
    step = max(1, BLOCK_BYTES // (kv.kv_heads * kv.row_bytes))
    for start in range(wanted.start, wanted.stop, step):
        rows = slice(start - kv.start, min(start + step, wanted.stop) - kv.start)
        yield KvBlock(
            (layer,), kv_head_start, start, kv.keys[None, :, rows], kv.values[None, :, rows]
        )
