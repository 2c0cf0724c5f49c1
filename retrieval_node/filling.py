"""A shard while its K and V arrive, in any order, until nothing is missing and it is sealed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from longreach.errors import FailedPrecondition, InvalidRequest, MalformedTensor
from longreach.types import (
    Identity,
    KvBlock,
    LayerGeometry,
    QuerySample,
    Shard,
    StorageArray,
    storage_dtype,
)
from retrieval_node.integrity import is_finite, same_bytes
from retrieval_node.shard import SealedShard, TokenIds, allocate_layers, sealed_shard
from retrieval_node.spans import SpanSet


class FillingShard:
    """A shard while K and V arrive. Invisible to sessions. Thread-safe.

    The arrays are allocated at once, because the header names the shard's size. Blocks may come in
    any order and more than once: positions written before must come with the same bytes again.
    """

    def __init__(
        self,
        context_id: str,
        shard: Shard,
        identity: Identity,
        geometry: Mapping[int, LayerGeometry],
    ) -> None:
        self.context_id = context_id
        self.shard = shard
        self.identity = identity
        self.geometry = dict(geometry)
        self._dtype = storage_dtype(identity.dtype)
        self._layers = allocate_layers(shard, geometry, self._dtype)
        self._written = {n: [SpanSet() for _ in range(shard.kv_heads)] for n in shard.layers}
        self._samples: dict[int, list[QuerySample]] = {}
        self._lock = threading.Lock()
        self._dropped = False
        self._sealed = False

    def write(self, block: KvBlock) -> None:
        """Stores a block.

        Raises InvalidRequest when it lies outside the shard, MalformedTensor for a wrong shape or
        dtype and for NaN and infinity, FailedPrecondition for other bytes at written positions.
        """
        self._check_place(block)
        for axis, layer in enumerate(block.layers):
            self._check_tensors(layer, block.keys[axis], block.values[axis], block)
        with self._lock:
            self._check_alive()
            for axis, layer in enumerate(block.layers):
                self._check_repeats(layer, block, axis)
            if self._sealed:
                return
            for axis, layer in enumerate(block.layers):
                self._store(layer, block, axis)

    def add_sample(self, sample: QuerySample, reserve: Callable[[int], None]) -> None:
        """Keeps prefill queries of a layer for its index, when `reserve(bytes)` does not raise.

        Positions sampled before are skipped, so a repeated Put adds nothing.
        """
        sample = self._own_heads(sample)
        with self._lock:
            self._check_alive()
            kept = self._samples.setdefault(sample.layer, [])
            seen = [s.positions for s in kept]
            known = np.concatenate(seen) if seen else np.empty(0, np.int64)
            new = np.flatnonzero(~np.isin(sample.positions, known))
            if self._sealed or not len(new):
                return
            row_bytes = sample.queries.shape[0] * sample.queries.shape[2] * sample.queries.itemsize
            reserve(len(new) * (row_bytes + sample.positions.itemsize))
            own = QuerySample(
                sample.layer,
                sample.kv_head_start,
                sample.positions[new],
                np.ascontiguousarray(sample.queries[:, new]),
            )
            kept.append(own)

    def samples(self) -> dict[int, QuerySample]:
        """One query sample for each layer that has some."""
        with self._lock:
            return {layer: _join(each) for layer, each in self._samples.items() if each}

    @property
    def bytes_written(self) -> int:
        """Bytes of K and V received so far."""
        with self._lock:
            return sum(
                len(written) * self._layers[layer].row_bytes
                for layer, heads in self._written.items()
                for written in heads
            )

    @property
    def nbytes(self) -> int:
        """Bytes of K and V when it is complete."""
        with self._lock:
            return sum(kv.keys.nbytes + kv.values.nbytes for kv in self._layers.values())

    def first_missing(self) -> tuple[int, int]:
        """The layer and position from which on a copy must be sent: everything in the layers
        before, and in that layer before the position, is here."""
        with self._lock:
            for layer in self.shard.layers:
                gaps = [written.first_gap(self.shard.span) for written in self._written[layer]]
                missing = [gap for gap in gaps if gap is not None]
                if missing:
                    return layer, min(missing)
        return self.shard.layers[-1] + 1, 0

    def drop(self) -> None:
        """Frees the arrays; writers that are still at work get FailedPrecondition."""
        with self._lock:
            self._dropped = True
            self._layers = {}
            self._written = {}
            self._samples = {}

    def seal(self, token_ids: TokenIds) -> SealedShard:
        """The finished shard; raises FailedPrecondition naming the first gap."""
        if len(token_ids) != len(self.shard.span):
            raise InvalidRequest(
                f"{len(token_ids)} token ids for a shard of {len(self.shard.span)} positions "
                f"{self.shard.span}; send one for each position"
            )
        with self._lock:
            self._check_alive()
            self._check_complete()
            self._sealed = True
            layers = self._layers
        # From here on writers only compare, so the checksum need not keep them waiting.
        return sealed_shard(
            self.context_id, self.shard, self.identity, self.geometry, layers, token_ids
        )

    def _check_alive(self) -> None:
        if self._dropped:
            raise FailedPrecondition(
                f"shard {self.shard.shard_id!r} of context {self.context_id!r} was dropped while "
                "it was being filled; put it again from the start",
                reason="SHARD_DROPPED",
            )

    def _check_place(self, block: KvBlock) -> None:
        shard = self.shard
        unknown = [layer for layer in block.layers if layer not in shard.layers]
        if unknown or not block.layers or len(set(block.layers)) != len(block.layers):
            raise InvalidRequest(
                f"block has layers {list(block.layers)}; name each once, out of the shard's "
                f"{list(shard.layers)}"
            )
        if block.keys.ndim != 4 or block.values.ndim != 4:
            raise MalformedTensor(
                f"block has keys {block.keys.shape} and values {block.values.shape}; both need "
                "the axes [layers, kv_heads, positions, dim]"
            )
        heads = (block.kv_head_start, block.kv_head_start + block.keys.shape[1])
        if heads[0] < shard.kv_head_start or heads[1] > shard.kv_head_stop:
            raise InvalidRequest(
                f"block has KV heads [{heads[0]}, {heads[1]}); the shard holds "
                f"[{shard.kv_head_start}, {shard.kv_head_stop})"
            )
        if block.span.intersect(shard.span) != block.span:
            raise InvalidRequest(f"block has positions {block.span}; the shard holds {shard.span}")

    def _check_tensors(
        self, layer: int, keys: StorageArray, values: StorageArray, block: KvBlock
    ) -> None:
        heads, positions = block.keys.shape[1:3]
        geometry = self.geometry[layer]
        for name, array, dim in (
            ("keys", keys, geometry.head_dim),
            ("values", values, geometry.value_dim),
        ):
            if array.shape != (heads, positions, dim) or array.dtype != self._dtype:
                raise MalformedTensor(
                    f"{name} of layer {layer} are {array.dtype} {array.shape}; expected "
                    f"{self._dtype} {(heads, positions, dim)}"
                )
            bad = np.argwhere(~is_finite(array))
            if len(bad):
                raise MalformedTensor(
                    f"{name} of layer {layer} hold NaN or infinity at KV head "
                    f"{block.kv_head_start + bad[0][0]}, position {block.start + bad[0][1]}; "
                    "the model overflowed or the sender is broken"
                )

    def _check_repeats(self, layer: int, block: KvBlock, axis: int) -> None:
        kv = self._layers[layer]
        first = block.kv_head_start - self.shard.kv_head_start
        for head in range(block.keys.shape[1]):
            for repeat in self._written[layer][first + head].overlaps(block.span):
                old = slice(repeat.start - kv.start, repeat.stop - kv.start)
                new = slice(repeat.start - block.start, repeat.stop - block.start)
                if not (
                    same_bytes(kv.keys[first + head, old], block.keys[axis, head, new])
                    and same_bytes(kv.values[first + head, old], block.values[axis, head, new])
                ):
                    raise FailedPrecondition(
                        f"layer {layer}, KV head {block.kv_head_start + head}, positions {repeat} "
                        f"of shard {self.shard.shard_id!r} were put before with other bytes; drop "
                        "the context and put it again",
                        reason="CONFLICTING_BYTES",
                    )

    def _store(self, layer: int, block: KvBlock, axis: int) -> None:
        kv = self._layers[layer]
        first = block.kv_head_start - self.shard.kv_head_start
        heads = slice(first, first + block.keys.shape[1])
        positions = slice(block.start - kv.start, block.span.stop - kv.start)
        kv.keys[heads, positions] = block.keys[axis]
        kv.values[heads, positions] = block.values[axis]
        for written in self._written[layer][heads]:
            written.add(block.span)

    def _check_complete(self) -> None:
        for layer in self.shard.layers:
            for head, written in enumerate(self._written[layer]):
                gap = written.first_gap(self.shard.span)
                if gap is not None:
                    raise FailedPrecondition(
                        f"shard {self.shard.shard_id!r} is not complete: layer {layer}, KV head "
                        f"{self.shard.kv_head_start + head} lacks position {gap} of "
                        f"{self.shard.span}; put it, then seal again",
                        reason="SHARD_INCOMPLETE",
                    )

    def _own_heads(self, sample: QuerySample) -> QuerySample:
        """The part of a sample that belongs to the shard's KV heads."""
        if sample.layer not in self.geometry:
            raise InvalidRequest(
                f"query sample of layer {sample.layer}; the shard holds {list(self.shard.layers)}"
            )
        geometry, shard = self.geometry[sample.layer], self.shard
        start = (shard.kv_head_start - sample.kv_head_start) * geometry.group
        stop = (shard.kv_head_stop - sample.kv_head_start) * geometry.group
        shape = (len(sample.positions), geometry.head_dim)
        if sample.queries.ndim != 3 or sample.queries.shape[1:] != shape:
            raise MalformedTensor(
                f"query sample of layer {sample.layer} is {sample.queries.shape}; expected "
                f"[q_heads, {shape[0]}, {shape[1]}]"
            )
        if start < 0 or stop > sample.queries.shape[0]:
            raise InvalidRequest(
                f"query sample of layer {sample.layer} has {sample.queries.shape[0]} query heads "
                f"from KV head {sample.kv_head_start}; send all groups of KV heads "
                f"[{shard.kv_head_start}, {shard.kv_head_stop})"
            )
        queries = sample.queries[start:stop]
        if not is_finite(queries).all():
            raise MalformedTensor(f"query sample of layer {sample.layer} holds NaN or infinity")
        return QuerySample(sample.layer, shard.kv_head_start, sample.positions, queries)


def _join(samples: Sequence[QuerySample]) -> QuerySample:
    """One sample of a layer out of several over the same heads, in order of position."""
    positions = np.concatenate([sample.positions for sample in samples])
    queries = np.concatenate([sample.queries for sample in samples], axis=1)
    order = np.argsort(positions, kind="stable")
    return QuerySample(
        samples[0].layer, samples[0].kv_head_start, positions[order], queries[:, order]
    )
