"""The KV of a session after its context: grows by Append, is attended exactly, moves by Read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from longreach.errors import FailedPrecondition, InvalidRequest, MalformedTensor, StaleEpoch
from longreach.types import AppendEntry, KvBlock, LayerGeometry, Shard, Span, StorageArray
from retrieval_node.index.base import LayerKv
from retrieval_node.integrity import is_finite, same_bytes
from retrieval_node.memory import Reservation
from retrieval_node.shard import check_geometry

_FIRST_CAPACITY = 64


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


@dataclass(frozen=True, slots=True)
class _Piece:
    """New K and V [heads, positions, dim] for heads of one place."""

    place: int
    first_head: int
    keys: StorageArray
    values: StorageArray


class SessionTail:
    """K and V of positions [start, stop) for the layers and KV heads that a node keeps.

    Not thread-safe: the session's lock guards it. Arrays that were handed out never change: growing
    and truncating replace them, appending writes beyond what was handed out.
    """

    def __init__(
        self,
        start: int,
        dtype: np.dtype[np.generic],
        places: Sequence[TailPlace],
        memory: Reservation,
    ) -> None:
        self.start = start
        self.stop = start
        self.epoch = 0
        self.places = tuple(places)
        self.token_ids: list[int] = []
        self._dtype = dtype
        self._memory = memory
        self._capacity = 0
        self._keys = [np.empty((p.heads, 0, p.geometry.head_dim), dtype) for p in places]
        self._values = [np.empty((p.heads, 0, p.geometry.value_dim), dtype) for p in places]
        self.geometry = {place.geometry.layer: place.geometry for place in places}
        self._by_layer: dict[int, list[int]] = {}
        for number, place in enumerate(self.places):
            self._by_layer.setdefault(place.geometry.layer, []).append(number)

    @property
    def span(self) -> Span:
        """Positions held."""
        return Span(self.start, self.stop)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers kept, ascending."""
        return tuple(self._by_layer)

    def view(self, layer: int) -> list[tuple[TailPlace, LayerKv]]:
        """K and V held now of a layer; stays as it is when the tail changes later."""
        held = self.stop - self.start
        return [
            (
                self.places[n],
                LayerKv(self._keys[n][:, :held], self._values[n][:, :held], self.start),
            )
            for n in self._by_layer.get(layer, ())
        ]

    def append(self, entry: AppendEntry) -> None:
        """Stores new positions.

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
            self._truncate(entry.start)
            self.epoch = entry.epoch
        repeated = max(0, min(self.stop, span.stop) - span.start)
        self._check_repeats(span.start, pieces, entry.token_ids[:repeated])
        if repeated == len(span):
            return
        self._grow(span.stop)
        self._store(span.start + repeated, repeated, pieces)
        self.token_ids.extend(entry.token_ids[repeated:])
        self.stop = span.stop

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
            held[piece.place][piece.first_head : piece.first_head + piece.keys.shape[0]] += 1
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
        same = self.token_ids[at : at + n] == list(token_ids)
        for piece in pieces if n else ():
            heads = slice(piece.first_head, piece.first_head + piece.keys.shape[0])
            same = (
                same
                and same_bytes(self._keys[piece.place][heads, at : at + n], piece.keys[:, :n])
                and same_bytes(self._values[piece.place][heads, at : at + n], piece.values[:, :n])
            )
        if not same:
            raise FailedPrecondition(
                f"positions [{start}, {start + n}) were appended before in epoch {self.epoch} with "
                "other bytes; take the session over with a newer epoch",
                reason="CONFLICTING_BYTES",
            )

    def _store(self, position: int, skip: int, pieces: Sequence[_Piece]) -> None:
        at = position - self.start
        for piece in pieces:
            heads = slice(piece.first_head, piece.first_head + piece.keys.shape[0])
            new = slice(at, at + piece.keys.shape[1] - skip)
            self._keys[piece.place][heads, new] = piece.keys[:, skip:]
            self._values[piece.place][heads, new] = piece.values[:, skip:]

    def _grow(self, stop: int) -> None:
        needed = stop - self.start
        if needed <= self._capacity:
            return
        capacity = max(needed, 2 * self._capacity, _FIRST_CAPACITY)
        self._memory.grow((capacity - self._capacity) * self._position_bytes)
        self._replace(capacity, self.stop)

    def _truncate(self, position: int) -> None:
        """Forgets positions from `position` on; arrays are copied, for readers may hold them."""
        if position < self.stop:
            self._replace(self._capacity, position)
            self.stop = position
            del self.token_ids[position - self.start :]

    def _replace(self, capacity: int, keep_stop: int) -> None:
        keep = keep_stop - self.start
        for arrays in (self._keys, self._values):
            for number, old in enumerate(arrays):
                new = np.empty((old.shape[0], capacity, old.shape[2]), self._dtype)
                new[:, :keep] = old[:, :keep]
                arrays[number] = new
        self._capacity = capacity

    @property
    def _position_bytes(self) -> int:
        dims = sum(p.heads * (p.geometry.head_dim + p.geometry.value_dim) for p in self.places)
        return dims * self._dtype.itemsize


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
