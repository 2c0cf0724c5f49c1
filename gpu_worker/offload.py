"""KV of a prefill on its way to the nodes: one Put stream for each copy of each shard.

Streams run on threads of their own over connections of their own, so neither decode steps nor the
device wait for them. What is queued is bounded: over the bound the prefill pauses (and other
sessions' steps run). When every layer is through, each copy is sealed with the token ids of its
span.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from longreach.errors import Internal, InvalidRequest, LongreachError
from longreach.rpc.retrieval import NodeClient
from longreach.types import (
    Identity,
    IntArray,
    KvBlock,
    LayerGeometry,
    QuerySample,
    Shard,
    ShardMap,
    Span,
    StorageArray,
)

log = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 256 << 20
"""KV waiting to be sent, all streams together, before a prefill pauses."""
_CHECK_S = 0.1
_JOIN_S = 5.0

Part = KvBlock | QuerySample


class PutNode(Protocol):
    """The part of NodeClient that ingest uses."""

    def put(
        self,
        context_id: str,
        shard: Shard,
        identity: Identity,
        geometry: Sequence[LayerGeometry],
        capability: bytes,
        parts: Iterator[Part],
    ) -> int:
        """Streams parts of a shard."""

    def seal(
        self, context_id: str, shard_id: str, capability: bytes, token_ids: Sequence[int]
    ) -> tuple[int, int]:
        """Seals a shard; returns its checksum and bytes."""

    def drop(self, context_id: str, capability: bytes) -> int:
        """Forgets a context."""

    def drop_shards(self, context_id: str, shard_ids: Sequence[str], capability: bytes) -> int:
        """Forgets some shards of a context."""

    def close(self) -> None:
        """Ends the connection."""


@dataclass(frozen=True, slots=True)
class Destination:
    """A context to be stored: what it is, where it goes and the leave to write it.

    `only` names the shards to compute, where the others are stored already; then there is leave to
    place the context too.
    """

    context_id: str
    identity: Identity
    shard_map: ShardMap
    capability: bytes
    only: frozenset[str] = frozenset()
    place_capability: bytes = b""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards to compute; raises InvalidRequest where a name is not in the map."""
        if not self.only:
            return self.shard_map.shards
        found = tuple(shard for shard in self.shard_map.shards if shard.shard_id in self.only)
        if len(found) != len(self.only):
            raise InvalidRequest(
                f"shards {sorted(self.only)} are to be computed; the map has "
                f"{sorted(shard.shard_id for shard in self.shard_map.shards)}"
            )
        return found

    @property
    def start(self) -> int:
        """The first position to compute."""
        return min(shard.span.start for shard in self.shards)


class _Room:
    """Counts queued bytes over all streams."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        with self._changed:
            self._used += size

    def give(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Whether there is room, waiting for it up to `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._used < self._limit, timeout_s)


class _PutStream:
    """One copy of one shard on its way to a node."""

    def __init__(
        self,
        to: Destination,
        shard: Shard,
        client: PutNode,
        layers: Sequence[LayerGeometry],
        room: _Room,
    ) -> None:
        self.shard = shard
        self.client = client
        self.error: LongreachError | None = None
        self._to = to
        self._layers = layers
        self._room = room
        self._queue: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name=f"put-{shard.shard_id}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, part: Part) -> None:
        self._room.take(_size(part))
        self._queue.put(part)

    def finish(self, check: Callable[[], None]) -> None:
        """Waits until everything is stored; `check` is called meanwhile and may raise."""
        self._queue.put(None)
        while self._thread.is_alive():
            self._thread.join(_CHECK_S)
            check()
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Stops sending."""
        self._abandoned = True
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            self.client.put(
                self._to.context_id,
                self.shard,
                self._to.identity,
                [self._layers[layer] for layer in self.shard.layers],
                self._to.capability,
                self._parts(),
            )
        except LongreachError as error:
            self.error = error
        except Exception as error:
            log.exception("put of shard %s failed", self.shard.shard_id)
            self.error = Internal(f"put of shard {self.shard.shard_id!r} failed: {error}")
        finally:
            self._queue.put(None)  # Frees gRPC's thread, which waits for the next part.

    def _parts(self) -> Iterator[Part]:
        while (part := self._queue.get()) is not None and not self._abandoned:
            yield part
            self._room.give(_size(part))


class Offload:
    """The sink of one prefill. `put` comes from the device's thread; so do the other calls.

    `connect` makes a node's client from its address.
    """

    def __init__(
        self,
        to: Destination,
        layers: Sequence[LayerGeometry],
        connect: Callable[[str], PutNode] = NodeClient,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
    ) -> None:
        self._to = to
        self._layers = tuple(layers)
        self._room = _Room(max_queued_bytes)
        addresses = to.shard_map.addresses
        used = sorted({node_id for shard in to.shards for node_id in shard.node_ids})
        self._clients = {node_id: connect(addresses[node_id]) for node_id in used}
        self._streams = [
            _PutStream(to, shard, self._clients[node_id], layers, self._room)
            for shard in to.shards
            for node_id in shard.node_ids
        ]
        self.offloaded_bytes = 0

    def start(self) -> None:
        """Opens the streams; a prefill that waits for its turn holds none."""
        for stream in self._streams:
            stream.start()

    def put(self, layer: int, start: int, keys: StorageArray, values: StorageArray) -> None:
        """Queues keys [kv_heads, n, head_dim] and values for every shard that holds some."""
        span = Span(start, start + keys.shape[1])
        self.offloaded_bytes += keys.nbytes + values.nbytes
        for stream in self._streams:
            shard = stream.shard
            common = span.intersect(shard.span)
            if layer not in shard.layers or not len(common):
                continue
            heads = slice(shard.kv_head_start, shard.kv_head_stop)
            part = slice(common.start - start, common.stop - start)
            stream.offer(
                KvBlock(
                    (layer,),
                    shard.kv_head_start,
                    common.start,
                    keys[None, heads, part],
                    values[None, heads, part],
                )
            )

    def put_queries(self, layer: int, positions: IntArray, queries: StorageArray) -> None:
        """Queues the layer's sampled queries [q_heads, n, head_dim], by the shards' heads."""
        group = self._layers[layer].group
        for stream in self._streams:
            shard = stream.shard
            if layer in shard.layers:
                heads = slice(shard.kv_head_start * group, shard.kv_head_stop * group)
                stream.offer(QuerySample(layer, shard.kv_head_start, positions, queries[heads]))

    def has_room(self, timeout_s: float) -> bool:
        """Whether more may be queued, waiting up to `timeout_s`. Raises what a stream died of."""
        for stream in self._streams:
            if stream.error is not None:
                raise stream.error
        return self._room.wait(timeout_s)

    def seal(self, token_ids: Sequence[int], check: Callable[[], None]) -> dict[str, int]:
        """Waits until all is stored and seals every copy; returns checksums by shard id.

        `check` is called meanwhile and may raise to give up. Raises Internal where two copies of a
        shard differ.
        """
        for stream in self._streams:
            stream.finish(check)
        checksums: dict[str, int] = {}
        for stream in self._streams:
            shard = stream.shard
            checksum, _ = stream.client.seal(
                self._to.context_id,
                shard.shard_id,
                self._to.capability,
                token_ids[shard.span.start : shard.span.stop],
            )
            if checksums.setdefault(shard.shard_id, checksum) != checksum:
                raise Internal(
                    f"copies of shard {shard.shard_id!r} have checksums "
                    f"{checksums[shard.shard_id]:#010x} and {checksum:#010x}; drop the context"
                )
        return checksums

    def drop(self) -> None:
        """Stops sending and makes the nodes forget what they were sent."""
        for stream in self._streams:
            stream.abandon()
        for node_id, client in self._clients.items():
            try:
                if self._to.only:
                    client.drop_shards(
                        self._to.context_id, sorted(self._to.only), self._to.place_capability
                    )
                else:
                    client.drop(self._to.context_id, self._to.capability)
            except LongreachError as error:
                log.warning("node %s did not drop %s: %s", node_id, self._to.context_id, error)

    def close(self) -> None:
        """Ends the connections."""
        for client in self._clients.values():
            client.close()


def _size(part: Part) -> int:
    if isinstance(part, KvBlock):
        return int(part.keys.nbytes + part.values.nbytes)
    return int(part.queries.nbytes)
