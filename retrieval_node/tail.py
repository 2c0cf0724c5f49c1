"""The KV of a session after its context: which appends it takes, epoch by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longreach.errors import FailedPrecondition, InvalidRequest, MalformedTensor, StaleEpoch
from longreach.types import AppendEntry, KvBlock, Span, StorageArray
from retrieval_node.builds import Builder
from retrieval_node.integrity import is_finite
from retrieval_node.memory import MemoryBudget
from retrieval_node.tail_chunks import TailChunks, TailPiece
from retrieval_node.tail_places import TailPlace


@dataclass(frozen=True, slots=True)
class _Piece:
    """New K and V [heads, positions, dim] for heads of one place."""

    place: int
    first_head: int
    keys: StorageArray
    values: StorageArray

    @property
    def heads(self) -> slice:
        """Which of the place's heads."""
        return slice(self.first_head, self.first_head + self.keys.shape[0])


class SessionTail:
    """K and V of positions [start, stop) for the layers and KV heads that a node keeps.

    Not thread-safe: the session's lock guards it. See TailChunks for how it is stored.
    """

    def __init__(
        self,
        name: str,
        start: int,
        dtype: np.dtype[np.generic],
        places: Sequence[TailPlace],
        memory: MemoryBudget,
        builder: Builder,
    ) -> None:
        self.epoch = 0
        self.places = tuple(places)
        self.token_ids: list[int] = []
        self._dtype = dtype
        self._chunks = TailChunks(name, start, dtype, places, memory, builder)
        self.geometry = {place.geometry.layer: place.geometry for place in places}
        self._by_layer: dict[int, list[int]] = {}
        for number, place in enumerate(self.places):
            self._by_layer.setdefault(place.geometry.layer, []).append(number)

    @property
    def start(self) -> int:
        """The first position: where the context ends."""
        return self._chunks.start

    @property
    def stop(self) -> int:
        """The position after the last one held."""
        return self._chunks.stop

    def view(self, layer: int) -> list[TailPiece]:
        """K and V held now of a layer; stays as it is when the tail changes later."""
        return [
            piece
            for number in self._by_layer.get(layer, ())
            for piece in self._chunks.pieces(number)
        ]

    def release(self) -> int:
        """Frees the tail and its indexes; returns the bytes freed."""
        return self._chunks.release()

    def append(self, entry: AppendEntry) -> int:
        """Stores new positions; returns how many were not held yet.

        Same epoch and bytes: nothing changes. Raises StaleEpoch for an older epoch,
        FailedPrecondition for other bytes under the same epoch and for a gap, ResourceExhausted
        when the memory is used up; a newer epoch truncates at its start first.
        """
        if entry.epoch < self.epoch:
            raise stale_epoch(entry.epoch, self.epoch)
        span = Span(entry.start, entry.start + len(entry.token_ids))
        self._check_span(span)
        pieces = self._pieces(entry.blocks, span)
        if entry.epoch > self.epoch:
            self._chunks.truncate(entry.start)
            del self.token_ids[entry.start - self.start :]
            self.epoch = entry.epoch
        repeated = max(0, min(self.stop, span.stop) - span.start)
        self._check_repeats(span.start, pieces, entry.token_ids[:repeated])
        if repeated == len(span):
            return 0
        self._chunks.reserve(span.stop)
        for piece in pieces:
            self._chunks.store(
                piece.place,
                piece.heads,
                span.start + repeated,
                piece.keys[:, repeated:],
                piece.values[:, repeated:],
            )
        self.token_ids.extend(entry.token_ids[repeated:])
        self._chunks.extend(span.stop)
        return len(span) - repeated

    def _check_span(self, span: Span) -> None:
        if not len(span) or span.start < self.start:
            raise InvalidRequest(
                f"appended positions are {span}; the tail begins at {self.start} and an append "
                "has at least one token"
            )
        if span.start > self.stop:
            raise FailedPrecondition(
                f"appended positions {span} leave a gap: the node holds [{self.start}, "
                f"{self.stop}) without one; append from {self.stop} on",
                reason="APPEND_GAP",
            )

    def _pieces(self, blocks: Sequence[KvBlock], span: Span) -> list[_Piece]:
        """The blocks cut along places; together they must hold every head of every place once."""
        pieces: list[_Piece] = []
        for block in blocks:
            _check_block(block, span)
            for axis, layer in enumerate(block.layers):
                pieces += self._pieces_of_layer(
                    layer, block.kv_head_start, block.keys[axis], block.values[axis]
                )
        held = [np.zeros(place.heads, np.int64) for place in self.places]
        for piece in pieces:
            held[piece.place][piece.heads] += 1
        for place, times in zip(self.places, held, strict=True):
            wrong = np.flatnonzero(times != 1)
            if len(wrong):
                raise InvalidRequest(
                    f"append has KV head {place.kv_head_start + wrong[0]} of layer "
                    f"{place.geometry.layer} {times[wrong[0]]} times; send each head of every "
                    "layer that the session keeps on this node exactly once",
                    reason="INCOMPLETE_APPEND",
                )
        return pieces

    def _pieces_of_layer(
        self, layer: int, first_head: int, keys: StorageArray, values: StorageArray
    ) -> list[_Piece]:
        pieces: list[_Piece] = []
        for number in self._by_layer.get(layer, ()):
            place = self.places[number]
            start = max(first_head, place.kv_head_start)
            stop = min(first_head + keys.shape[0], place.kv_head_stop)
            if start >= stop:
                continue
            heads = slice(start - first_head, stop - first_head)
            _check_array("keys", layer, keys, place.geometry.head_dim, self._dtype)
            _check_array("values", layer, values, place.geometry.value_dim, self._dtype)
            first = start - place.kv_head_start
            pieces.append(_Piece(number, first, keys[heads], values[heads]))
        return pieces

    def _check_repeats(
        self, start: int, pieces: Sequence[_Piece], token_ids: Sequence[int]
    ) -> None:
        n = len(token_ids)
        at = start - self.start
        same = self.token_ids[at : at + n] == list(token_ids) and all(
            self._chunks.same(p.place, p.heads, start, p.keys[:, :n], p.values[:, :n])
            for p in pieces
        )
        if not same:
            raise FailedPrecondition(
                f"positions [{start}, {start + n}) were appended before in epoch {self.epoch} with "
                "other bytes; take the session over with a newer epoch",
                reason="CONFLICTING_BYTES",
            )


def stale_epoch(epoch: int, current: int) -> StaleEpoch:
    """The error a writer or reader gets whose session was taken over."""
    return StaleEpoch(
        f"epoch {epoch} is over: the session was taken over in epoch {current}; open it again "
        "with a newer epoch, or stop"
    )


def _check_block(block: KvBlock, span: Span) -> None:
    keys, values = block.keys.shape, block.values.shape
    expected = (len(block.layers), len(span))
    if len(keys) != 4 or keys[:3] != values[:3] or (keys[0], keys[2]) != expected:
        raise MalformedTensor(
            f"appended block has keys {keys} and values {values}; expected [{expected[0]} layers, "
            f"kv_heads, {expected[1]} positions, dim] for both"
        )
    if block.start != span.start:
        raise InvalidRequest(f"appended block starts at {block.start}, its entry at {span.start}")


def _check_array(
    name: str, layer: int, array: StorageArray, dim: int, dtype: np.dtype[np.generic]
) -> None:
    if array.shape[-1] != dim or array.dtype != dtype:
        raise MalformedTensor(
            f"appended {name} of layer {layer} are {array.dtype} {array.shape}; expected {dtype} "
            f"with rows of {dim}"
        )
    if not is_finite(array).all():
        raise MalformedTensor(f"appended {name} of layer {layer} hold NaN or infinity")
