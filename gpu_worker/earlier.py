"""KV of the positions before a prefill's start, read back from the nodes while it runs.

When the copies of a span are lost, only that span is computed again; its tokens attend those before
them, whose keys and values the nodes still have. They come layer by layer, one layer ahead of the
device, from a stream for each shard: layers ascend in it as they do in the model.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from gpu_worker.offload import Destination
from longreach.errors import Cancelled, DeadlineExceeded, Internal, LongreachError, Unavailable
from longreach.types import KvBlock, LayerGeometry, Shard, ShardPart, StorageArray, storage_dtype

log = logging.getLogger(__name__)

LayerKv = tuple[StorageArray, StorageArray]
"""Keys [kv_heads, start, head_dim] and values [kv_heads, start, value_dim] of one layer."""
_POLL_S = 0.005
_JOIN_S = 5.0


class ReadNode(Protocol):
    """The part of NodeClient that is used here."""

    def read_shard(
        self, context_id: str, shard_id: str, capability: bytes, layer: int, start: int
    ) -> Iterator[ShardPart]:
        """A sealed shard from a layer's position on."""

    def close(self) -> None:
        """Ends the connection."""


class EarlierKv:
    """Positions [0, start) of every layer, in order. `take` is called by the device's thread."""

    def __init__(
        self,
        of: Destination,
        layers: Sequence[LayerGeometry],
        start: int,
        connect: Callable[[str], ReadNode],
    ) -> None:
        self._layers = tuple(layers)
        self._start = start
        self._dtype = storage_dtype(of.identity.dtype)
        self._shards = [
            _ShardStream(of, shard, connect)
            for shard in of.shard_map.shards
            if shard.span.start < start
        ]
        self._ready: queue.Queue[tuple[int, LayerKv] | LongreachError] = queue.Queue(maxsize=1)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="earlier-kv", daemon=True)
        self._thread.start()

    def take(self, layer: int, meanwhile: Callable[[], object]) -> LayerKv:
        """A layer's keys and values; layers are taken in order. `meanwhile` is called while they
        are not here yet and may raise to give up. Raises what no holder of a shard would give."""
        while True:
            try:
                ready = self._ready.get(timeout=_POLL_S)
                break
            except queue.Empty:
                meanwhile()
        if isinstance(ready, LongreachError):
            raise ready
        if ready[0] != layer:
            raise Internal(f"layer {layer} was asked for and {ready[0]} is next")
        return ready[1]

    def close(self) -> None:
        """Ends the streams."""
        self._closing.set()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            for geometry in self._layers:
                self._offer((geometry.layer, self._read(geometry)))
        except Cancelled:
            pass
        except LongreachError as error:
            with contextlib.suppress(Cancelled):
                self._offer(error)
        except Exception as error:
            log.exception("reading earlier KV failed")
            with contextlib.suppress(Cancelled):
                self._offer(Internal(f"reading earlier KV failed: {error}"))
        finally:
            for shard in self._shards:
                shard.close()

    def _read(self, geometry: LayerGeometry) -> LayerKv:
        keys = np.zeros((geometry.kv_heads, self._start, geometry.head_dim), self._dtype)
        values = np.zeros((geometry.kv_heads, self._start, geometry.value_dim), self._dtype)
        filled = np.zeros((geometry.kv_heads, self._start), bool)
        for shard in self._shards:
            for block in shard.blocks(geometry.layer):
                if self._closing.is_set():
                    raise Cancelled("the prefill ended")
                heads = slice(block.kv_head_start, block.kv_head_start + block.keys.shape[1])
                count = min(block.span.stop, self._start) - block.start
                where = slice(block.start, block.start + count)
                keys[heads, where] = block.keys[0, :, :count]
                values[heads, where] = block.values[0, :, :count]
                filled[heads, where] = True
        if not filled.all():
            head, position = np.argwhere(~filled)[0].tolist()
            raise Unavailable(
                f"the nodes did not return position {position} of layer {geometry.layer}, KV head "
                f"{head}; it is needed to compute those from {self._start} on"
            )
        return keys, values

    def _offer(self, ready: tuple[int, LayerKv] | LongreachError) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(ready, timeout=_POLL_S)
                return
            except queue.Full:
                continue
        raise Cancelled("the prefill ended")


class _ShardStream:
    """The blocks of one shard, from whichever holder answers."""

    def __init__(self, of: Destination, shard: Shard, connect: Callable[[str], ReadNode]) -> None:
        self._of = of
        self._shard = shard
        self._connect = connect
        self._holders = list(shard.node_ids)
        self._client: ReadNode | None = None
        self._parts: Iterator[ShardPart] = iter(())
        self._ahead: KvBlock | None = None

    def blocks(self, layer: int) -> Iterator[KvBlock]:
        """The blocks of a layer, positions ascending; begun anew at another holder where one is
        lost, so that some may come twice. Raises Unavailable when no holder is left."""
        if layer not in self._shard.layers:
            return
        while True:
            try:
                yield from self._of_layer(layer)
                return
            except (Unavailable, DeadlineExceeded) as error:
                log.warning("shard %s: %s", self._shard.shard_id, error)
                self.close()
                if not self._holders:
                    raise

    def close(self) -> None:
        """Ends the stream."""
        if self._client is not None:
            self._client.close()
        self._client, self._parts, self._ahead = None, iter(()), None

    def _of_layer(self, layer: int) -> Iterator[KvBlock]:
        if self._client is None:
            node_id = self._holders.pop(0)
            self._client = self._connect(self._of.shard_map.addresses[node_id])
            self._parts = self._client.read_shard(
                self._of.context_id, self._shard.shard_id, self._of.place_capability, layer, 0
            )
        while True:
            block = self._ahead or next(
                (part for part in self._parts if isinstance(part, KvBlock)), None
            )
            self._ahead = None
            if block is None:
                return
            if block.layers[0] > layer:
                self._ahead = block
                return
            if block.layers[0] == layer:
                yield block
