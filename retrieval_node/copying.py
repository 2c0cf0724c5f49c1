"""Copies of sealed shards from node to node: what a repair, a drain and a rebalance are made of.

The node that is to hold the copy asks the one that holds the shard; both limit the rate. The copy
stays invisible until its checksum is that of the source. A copy that was interrupted goes on where
it stopped, as long as the shard's time-out allows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from longreach import telemetry
from longreach.errors import Cancelled, Internal, InvalidRequest
from longreach.types import (
    CopyProgress,
    KvBlock,
    QuerySample,
    ShardEnd,
    ShardHeader,
    ShardPart,
    Span,
)
from retrieval_node.contexts import Served
from retrieval_node.reading import cut_blocks
from retrieval_node.shard_file import read_samples
from retrieval_node.store import Store

_COPY_BYTES = telemetry.counter("copy_bytes")
_BYTES_IN = _COPY_BYTES.bind(direction="in")
_BYTES_OUT = _COPY_BYTES.bind(direction="out")

PROGRESS_S = 0.25
"""Time between two reports of progress."""


class Peer(Protocol):
    """The part of NodeClient that a copy uses."""

    def read_shard(
        self, context_id: str, shard_id: str, capability: bytes, layer: int, start: int
    ) -> Iterator[ShardPart]:
        """A sealed shard from a layer's position on."""

    def close(self) -> None:
        """Ends the connection."""


class Bandwidth:
    """Bytes per second, shared by all copies of a node; 0 for no limit. Thread-safe."""

    def __init__(self, bytes_per_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_at = 0.0
        self._lock = threading.Lock()

    def delay_s(self, size: int) -> float:
        """Takes `size` bytes; how long to wait before they are moved."""
        if not self._bytes_per_s:
            return 0.0
        with self._lock:
            now = self._clock()
            begin = max(now, self._free_at)
            self._free_at = begin + size / self._bytes_per_s
            return begin - now

    def take(self, size: int, cancelled: threading.Event) -> None:
        """Waits for `size` bytes; raises Cancelled as soon as the copy is."""
        if cancelled.wait(self.delay_s(size)):
            raise Cancelled("the copy was cancelled")


class Copier:
    """Both ends of a copy. `connect(node_id, address)` makes a client of a peer."""

    def __init__(
        self, store: Store, bandwidth: Bandwidth, connect: Callable[[str, str], Peer]
    ) -> None:
        self._store = store
        self._bandwidth = bandwidth
        self._connect = connect

    def read_shard(
        self,
        context_id: str,
        shard_id: str,
        capability: bytes,
        layer: int,
        start: int,
        cancelled: threading.Event,
    ) -> Iterator[ShardPart]:
        """A sealed shard, its K and V from position `start` of `layer` on, layers ascending.

        Raises PermissionDenied, NotFound, FailedPrecondition while it is not sealed, Cancelled.
        """
        served = self._store.sealed_for_copy(context_id, shard_id, capability)
        sealed = served.sealed
        yield ShardHeader(
            context_id, sealed.shard, sealed.identity, tuple(sealed.geometry.values())
        )
        yield from _samples(served).values()
        for number in sealed.shard.layers:
            if number < layer:
                continue
            kv = sealed.layers[number]
            wanted = kv.positions
            if number == layer:
                wanted = wanted.intersect(Span(start, max(start, wanted.stop)))
            for block in cut_blocks(number, kv, sealed.shard.kv_head_start, wanted):
                self._bandwidth.take(_bytes_of(block), cancelled)
                _BYTES_OUT.add(_bytes_of(block))
                yield block
        yield ShardEnd(sealed.token_ids, sealed.checksum)

    def copy(
        self,
        context_id: str,
        shard_id: str,
        capability: bytes,
        source_id: str,
        source_address: str,
        cancelled: threading.Event,
    ) -> Iterator[CopyProgress]:
        """Takes a shard over from another node; the last progress is sealed.

        A shard that is held already is left alone. Raises what the source refuses,
        ResourceExhausted where there is no room, Internal where other bytes came than were sealed.
        """
        found = self._store.found_for_copy(context_id, shard_id, capability)
        if isinstance(found, Served):
            size = found.sealed.nbytes
            yield CopyProgress(size, size, True, found.sealed.checksum)
            return
        layer, start = found.fill.first_missing() if found is not None else (0, 0)
        peer = self._connect(source_id, source_address)
        try:
            parts = peer.read_shard(context_id, shard_id, capability, layer, start)
            yield from self._take(context_id, capability, parts, cancelled)
        finally:
            peer.close()

    def _take(
        self,
        context_id: str,
        capability: bytes,
        parts: Iterator[ShardPart],
        cancelled: threading.Event,
    ) -> Iterator[CopyProgress]:
        header = next(parts, None)
        if not isinstance(header, ShardHeader):
            raise Internal("the peer sent a shard without a header; see its log")
        reported = time.monotonic()
        with self._store.put(
            context_id, header.shard, header.identity, header.geometry, capability, action="place"
        ) as put:
            total = put.bytes_total
            for part in parts:
                if isinstance(part, KvBlock):
                    self._bandwidth.take(_bytes_of(part), cancelled)
                    put.write(part)
                    _BYTES_IN.add(_bytes_of(part))
                elif isinstance(part, QuerySample):
                    put.add_sample(part)
                elif isinstance(part, ShardEnd):
                    checksum, size = self._store.seal_copy(
                        context_id, header.shard.shard_id, capability, part.token_ids, part.checksum
                    )
                    yield CopyProgress(size, total, True, checksum)
                    return
                else:
                    raise InvalidRequest("the peer sent a second header")
                if time.monotonic() - reported >= PROGRESS_S:
                    reported = time.monotonic()
                    yield CopyProgress(put.bytes_stored, total)
        raise Internal("the peer ended the shard before its end; see its log")


def _samples(served: Served) -> dict[int, QuerySample]:
    """Prefill queries of the shard: those that builds still wait for, else those on the disk."""
    waiting = served.indexes.samples()
    if waiting or served.snapshot is None:
        return waiting
    return read_samples(served.snapshot)


def _bytes_of(block: KvBlock) -> int:
    return int(block.keys.nbytes + block.values.nbytes)
