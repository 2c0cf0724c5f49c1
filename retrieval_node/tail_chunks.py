"""Where a session's tail lies: chunks of positions, of which the full ones get an index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from longreach.types import StorageArray
from retrieval_node.aligned import aligned_empty
from retrieval_node.builds import FIRST_KIND, Builder, LayerIndexes
from retrieval_node.index.auto import EXACT_BELOW
from retrieval_node.index.base import Index, LayerKv
from retrieval_node.integrity import same_bytes
from retrieval_node.memory import MemoryBudget, Use
from retrieval_node.tail_places import TailPlace

CHUNK_POSITIONS = EXACT_BELOW
"""Positions of a chunk: the fewest over which an index answers sooner than exact attention. Shorter
chunks would never be indexed; with longer ones, more of a tail would be attended exactly, and
growing and truncating would copy more."""

_FIRST_CAPACITY = 64


@dataclass(frozen=True, slots=True)
class TailPiece:
    """K and V of one chunk and place as they are now; `index` answers for them where one is built,
    else they are attended exactly."""

    place: TailPlace
    kv: LayerKv
    index: Index | None


@dataclass(slots=True)
class _Chunk:
    """K and V [heads, capacity, dim] of each place, from position `start` on, and, once the chunk
    is full, the indexes of each searched place by its number."""

    start: int
    capacity: int
    kv: list[LayerKv]
    indexes: dict[int, LayerIndexes] = field(default_factory=dict)

    def drop_indexes(self) -> int:
        """Cancels builds and frees the indexes; returns the bytes freed."""
        freed = sum(indexes.release() for indexes in self.indexes.values())
        self.indexes.clear()
        return freed


class TailChunks:
    """K and V of positions [start, stop) for each place, in chunks of CHUNK_POSITIONS.

    Only the last chunk grows; a full one never moves, and each of its searched places gets the
    builder's kind of index in the background. Not thread-safe. Arrays that were handed out never
    change: growing and truncating replace them, storing writes beyond what was handed out.
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
        self.start = start
        self.stop = start
        self._name = name
        self._dtype = dtype
        self._places = tuple(places)
        self._memory = memory.reserve(Use.TAIL, 0, name)
        self._builder = builder
        self._chunks: list[_Chunk] = []

    def pieces(self, number: int) -> Iterator[TailPiece]:
        """What is held now of a place, positions ascending."""
        place = self._places[number]
        for chunk in self._chunks:
            held = min(self.stop - chunk.start, CHUNK_POSITIONS)
            kv = chunk.kv[number]
            if held < chunk.capacity:
                kv = LayerKv(kv.keys[:, :held], kv.values[:, :held], chunk.start)
            indexes = chunk.indexes.get(number)
            index = indexes.serving[place.geometry.layer] if indexes is not None else None
            if index is not None and index.kind == FIRST_KIND:
                index = None  # exact attention over all pieces together beats one call for each
            yield TailPiece(place, kv, index)

    def same(
        self, number: int, heads: slice, start: int, keys: StorageArray, values: StorageArray
    ) -> bool:
        """Whether heads of a place hold these bytes [heads, positions, dim] from `start` on."""
        return all(
            same_bytes(kv.keys[heads, rows], keys[:, given])
            and same_bytes(kv.values[heads, rows], values[:, given])
            for kv, rows, given in self._overlaps(number, start, keys.shape[1])
        )

    def reserve(self, stop: int) -> None:
        """Makes room for positions below `stop`; ResourceExhausted, and no change, without it."""
        capacities = self._capacities(stop - self.start)
        held = sum(chunk.capacity for chunk in self._chunks)
        if sum(capacities) == held:
            return
        self._memory.grow((sum(capacities) - held) * self._position_bytes)
        for number, capacity in enumerate(capacities):
            if number == len(self._chunks):
                self._chunks.append(self._allocate(number, capacity))
            elif self._chunks[number].capacity < capacity:
                self._chunks[number] = self._copy(number, capacity, self.stop)

    def store(
        self, number: int, heads: slice, start: int, keys: StorageArray, values: StorageArray
    ) -> None:
        """Writes heads of a place from `start` >= `stop` on, for which room was reserved."""
        for kv, rows, given in self._overlaps(number, start, keys.shape[1]):
            kv.keys[heads, rows] = keys[:, given]
            kv.values[heads, rows] = values[:, given]

    def extend(self, stop: int) -> None:
        """Takes what was stored below `stop` into the tail; full chunks go to the builder."""
        full_before = (self.stop - self.start) // CHUNK_POSITIONS
        full_now = (stop - self.start) // CHUNK_POSITIONS
        self.stop = stop
        for chunk in self._chunks[full_before:full_now]:
            self._index(chunk)

    def truncate(self, position: int) -> None:
        """Forgets positions from `position` on, with the index of a chunk it cuts; what is kept of
        that chunk is copied, for readers may hold its arrays."""
        if position >= self.stop:
            return
        whole, cut = divmod(position - self.start, CHUNK_POSITIONS)
        if cut:
            self._chunks[whole].drop_indexes()
            self._chunks[whole] = self._copy(whole, self._chunks[whole].capacity, position)
        for chunk in self._chunks[whole + bool(cut) :]:
            chunk.drop_indexes()
            self._memory.shrink(chunk.capacity * self._position_bytes)
        del self._chunks[whole + bool(cut) :]
        self.stop = position

    def release(self) -> int:
        """Drops everything; returns the bytes freed, indexes included."""
        freed = sum(chunk.drop_indexes() for chunk in self._chunks)
        self._chunks.clear()
        self.stop = self.start
        return freed + self._memory.release()

    def _capacities(self, positions: int) -> list[int]:
        """Capacity of each chunk for that many positions: the last one's doubles as it grows."""
        capacities = []
        for number in range(-(-positions // CHUNK_POSITIONS)):
            needed = min(CHUNK_POSITIONS, positions - number * CHUNK_POSITIONS)
            held = self._chunks[number].capacity if number < len(self._chunks) else 0
            grown = min(CHUNK_POSITIONS, max(needed, 2 * held, _FIRST_CAPACITY))
            capacities.append(held if held >= needed else grown)
        return capacities

    def _allocate(self, number: int, capacity: int) -> _Chunk:
        start = self.start + number * CHUNK_POSITIONS
        kv = [
            LayerKv(
                aligned_empty((place.heads, capacity, place.geometry.head_dim), self._dtype),
                aligned_empty((place.heads, capacity, place.geometry.value_dim), self._dtype),
                start,
            )
            for place in self._places
        ]
        return _Chunk(start, capacity, kv)

    def _copy(self, number: int, capacity: int, stop: int) -> _Chunk:
        """Chunk `number` in new arrays, with its positions below `stop`."""
        old, new = self._chunks[number], self._allocate(number, capacity)
        kept = slice(0, stop - old.start)
        for ours, theirs in zip(new.kv, old.kv, strict=True):
            ours.keys[:, kept] = theirs.keys[:, kept]
            ours.values[:, kept] = theirs.values[:, kept]
        return new

    def _index(self, chunk: _Chunk) -> None:
        """Queues the builds of a full chunk: each layer apart, because its KV heads differ."""
        for number, (place, kv) in enumerate(zip(self._places, chunk.kv, strict=True)):
            kv.keys.flags.writeable = False
            kv.values.flags.writeable = False
            if place.geometry.sliding_window:
                continue
            name = f"positions {kv.positions} of the {self._name}"
            indexes = LayerIndexes(name, {place.geometry.layer: kv}, self._builder.kind)
            chunk.indexes[number] = indexes
            self._builder.start(indexes)

    def _overlaps(
        self, number: int, start: int, count: int
    ) -> Iterator[tuple[LayerKv, slice, slice]]:
        """K and V of a place in each chunk that [start, start + count) touches, the rows touched
        there and which of the `count` they are."""
        first, stop = start - self.start, start - self.start + count
        while first < stop:
            chunk, row = divmod(first, CHUNK_POSITIONS)
            length = min(CHUNK_POSITIONS - row, stop - first)
            given = first + self.start - start
            kv = self._chunks[chunk].kv[number]
            yield kv, slice(row, row + length), slice(given, given + length)
            first += length

    @property
    def _position_bytes(self) -> int:
        dims = sum(p.heads * (p.geometry.head_dim + p.geometry.value_dim) for p in self._places)
        return dims * self._dtype.itemsize
