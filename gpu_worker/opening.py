"""Opens a session on its nodes and reads its resident set back.

Runs outside the thread that owns the device: it waits for nodes. A worker is a cache, so this is
also how a session moves: the nodes hold its tail, and the next row starts where they end. A node
that holds less of the tail than another one of the same shard is given what it misses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gpu_worker.asks import NodeSession
from gpu_worker.resident import Kind
from gpu_worker.routes import END, Route
from gpu_worker.tail_copy import copied_entries
from longreach.errors import (
    DeadlineExceeded,
    LongreachError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from longreach.rpc.retrieval import NodeClient
from longreach.types import (
    AppendEntry,
    Identity,
    KvBlock,
    LayerGeometry,
    SessionRecord,
    Shard,
    Span,
    StorageArray,
    storage_dtype,
)

log = logging.getLogger(__name__)

OPEN_S = 1.0
"""Longest that opening a session on a node may take where another one holds the same."""
OPEN_ALONE_S = 5.0
CLOSE_S = 1.0
"""Longest that closing a session on a node may take; whoever keeps count of open sessions closes it
later on a node that did not answer."""
READ_S = 10.0
"""Longest that reading a run of positions may take."""
COPY_S = 30.0
OPENING_THREADS = 32

Kv = tuple[StorageArray, StorageArray]
# A node that answers so does not hold what it should, at the moment; another one may.
_AWAY = (Unavailable, DeadlineExceeded, NotFound, ResourceExhausted)


class SessionNode(Protocol):
    """The part of NodeClient that opening a session uses."""

    def open_session(
        self,
        capability: bytes,
        record: SessionRecord,
        identity: Identity,
        tail_shards: Sequence[Shard],
        geometry: Sequence[LayerGeometry],
        timeout_s: float | None = None,
    ) -> tuple[int, int]:
        """Opens a session; returns its handle and one past the last position held."""

    def read(
        self,
        handle: int,
        span: Span,
        layers: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> Iterator[KvBlock]:
        """KV of a session's positions."""

    def append(self, entries: Iterable[AppendEntry], timeout_s: float | None = None) -> int:
        """Stores KV of a session's tail; returns one past the last position held."""

    def close_session(self, handle: int, timeout_s: float | None = None) -> int:
        """Ends a session."""

    def close(self) -> None:
        """Ends the connection."""


@dataclass(frozen=True, slots=True)
class ResidentPart:
    """KV of one layer over one span: keys [kv_heads, n, head_dim], values [kv_heads, n, dv]."""

    layer: int
    start: int
    keys: StorageArray
    values: StorageArray


@dataclass(frozen=True, slots=True)
class Opened:
    """An open session: where it stands, its nodes, and what belongs on the device."""

    stop: int
    nodes: NodeSession
    resident: tuple[ResidentPart, ...]


class Opener:
    """Opens sessions of one model. Thread-safe; keeps one connection per node.

    `kinds` and `kind_of` say which positions each layer keeps resident.
    """

    def __init__(
        self,
        layers: Sequence[LayerGeometry],
        kinds: Sequence[Kind],
        kind_of: Sequence[int],
        window: int,
        connect: Callable[[str], SessionNode] = NodeClient,
    ) -> None:
        self._layers = tuple(layers)
        self._kinds = tuple(kinds)
        self._kind_of = tuple(kind_of)
        self._window = window
        self._connect = connect
        self._clients: dict[str, SessionNode] = {}
        self._pool = ThreadPoolExecutor(OPENING_THREADS, thread_name_prefix="open-session")

    def node(self, address: str) -> SessionNode:
        """The client of a node."""
        client = self._clients.get(address)
        if client is None:
            client = self._clients.setdefault(address, self._connect(address))
        return client

    def open(
        self, record: SessionRecord, identity: Identity, route: Route, capability: bytes
    ) -> Opened:
        """Opens the session on every node that answers and reads the resident set.

        Raises Unavailable where no node of a shard answers, and what a node refused with.
        """
        nodes, stops = self._open_on_nodes(record, identity, route, capability)
        stop = _common_stop(nodes, stops, record)
        try:
            self._catch_up(nodes, stops, stop, record, identity)
            resident = self._read_resident(nodes, stop, identity)
        except LongreachError:
            self._give_up(nodes, stops, record)
            raise
        return Opened(stop, nodes, resident)

    def _give_up(self, nodes: NodeSession, stops: Mapping[str, int], record: SessionRecord) -> None:
        """Closes a session that could not be opened, unless that would lose a tail.

        A session that stands beyond its context is being taken over; its nodes keep the tail for
        the next try.
        """
        if all(stop == record.context_stop for stop in stops.values()):
            self.close(nodes)

    def close(self, nodes: NodeSession) -> bool:
        """Ends the session on its nodes; whether it is known to be open on none of them.

        A node that did not answer when the session was opened may have opened it all the same.
        """

        def close_on(node_id: str, handle: int) -> int:
            return self.node(nodes.route.addresses[node_id]).close_session(handle, CLOSE_S)

        closed = nodes.handles.keys() >= nodes.route.addresses.keys()
        asked = {n: self._pool.submit(close_on, n, handle) for n, handle in nodes.handles.items()}
        for node_id, answer in asked.items():
            try:
                answer.result()
            except LongreachError as error:
                log.warning("session was not closed on node %s: %s", node_id, error)
                closed = False
        return closed

    def disconnect(self) -> None:
        """Ends every connection."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for client in self._clients.values():
            client.close()

    def _open_on_nodes(
        self, record: SessionRecord, identity: Identity, route: Route, capability: bytes
    ) -> tuple[NodeSession, dict[str, int]]:
        handles: dict[str, int] = {}
        stops: dict[str, int] = {}
        failures: dict[str, LongreachError] = {}

        def open_on(node_id: str) -> tuple[int, int]:
            shards = route.tail_shards.get(node_id, ())
            kept = sorted({layer for shard in shards for layer in shard.layers})
            return self.node(route.addresses[node_id]).open_session(
                capability,
                record,
                identity,
                shards,
                [self._layers[i] for i in kept],
                OPEN_S if _replicated(route, node_id) else OPEN_ALONE_S,
            )

        asked = {node_id: self._pool.submit(open_on, node_id) for node_id in route.addresses}
        refused: LongreachError | None = None
        for node_id, answer in asked.items():
            try:
                handles[node_id], stop = answer.result()
            except LongreachError as error:
                failures[node_id] = error
                if not isinstance(error, _AWAY):
                    refused = error
            else:
                if route.tail_shards.get(node_id):
                    stops[node_id] = stop
        nodes = NodeSession(route, handles, set(failures))
        if refused is not None:
            self._give_up(nodes, stops, record)
            raise refused
        for pieces in route.pieces:
            for piece in pieces:
                if not nodes.holders(piece):
                    self._give_up(nodes, stops, record)
                    unknown = [failures[n] for n in piece.node_ids]
                    if all(isinstance(each, NotFound) for each in unknown):
                        raise unknown[0]
                    causes = "; ".join(failures[n].message for n in piece.node_ids)
                    raise Unavailable(f"no node of shard {piece.shard_id!r} answers: {causes}")
        return nodes, stops

    def _catch_up(
        self,
        nodes: NodeSession,
        stops: Mapping[str, int],
        stop: int,
        record: SessionRecord,
        identity: Identity,
    ) -> None:
        """Gives nodes that hold less of the tail what they miss; one that cannot take it is left
        out of the session."""
        behind = {node_id: held for node_id, held in stops.items() if held < stop}
        nodes.lost.update(behind)
        dtype = storage_dtype(identity.dtype)

        def read(layers: Sequence[int], span: Span) -> dict[int, Kv]:
            parts = self._read_span(nodes, layers, span, dtype)
            return {part.layer: (part.keys, part.values) for part in parts}

        for node_id, held in behind.items():
            route = nodes.route
            entries = copied_entries(
                record,
                Span(held, stop),
                nodes.handles[node_id],
                route.tail_shards[node_id],
                self._layers,
                read,
            )
            try:
                self.node(route.addresses[node_id]).append(entries, COPY_S)
            except LongreachError as error:
                log.warning("node %s is left out of a session: %s", node_id, error)
            else:
                nodes.lost.discard(node_id)

    def _read_resident(
        self, nodes: NodeSession, stop: int, identity: Identity
    ) -> tuple[ResidentPart, ...]:
        parts: list[ResidentPart] = []
        dtype = storage_dtype(identity.dtype)
        for number, kind in enumerate(self._kinds):
            members = [i for i, other in enumerate(self._kind_of) if other == number]
            for span in kind.resident(stop, self._window):
                if len(span):
                    parts.extend(self._read_span(nodes, members, span, dtype))
        return tuple(parts)

    def _read_span(
        self,
        nodes: NodeSession,
        members: Sequence[int],
        span: Span,
        dtype: np.dtype[np.generic],
    ) -> list[ResidentPart]:
        """The span of some layers, from the nodes that hold it; all of it or an error. A node that
        fails is left out where another one holds the same."""
        while True:
            room = {layer: _Room(self._layers[layer], span, dtype) for layer in members}
            failed = False
            for node_id, wanted in _asked(nodes, members, span).items():
                try:
                    self._read_from(nodes, node_id, wanted, room)
                except _AWAY as error:
                    if not nodes.can_lose(node_id):
                        raise
                    log.warning("node %s is left out of a session: %s", node_id, error)
                    nodes.lost.add(node_id)
                    failed = True
            if not failed:
                return [each.part(layer) for layer, each in room.items()]

    def _read_from(
        self,
        nodes: NodeSession,
        node_id: str,
        wanted: Mapping[Span, Sequence[int]],
        room: Mapping[int, _Room],
    ) -> None:
        client = self.node(nodes.route.addresses[node_id])
        for part, layers in wanted.items():
            for block in client.read(nodes.handles[node_id], part, layers, READ_S):
                for axis, layer in enumerate(block.layers):
                    if layer in room:
                        room[layer].put(block, axis)


def _common_stop(nodes: NodeSession, stops: Mapping[str, int], record: SessionRecord) -> int:
    """Where a session stands: each part of its tail is on some node up to there."""
    if not record.known_ids:  # What is missing could not be copied.
        return min(stops.values(), default=record.context_stop)
    tails = {piece for pieces in nodes.route.pieces for piece in pieces if piece.span.stop == END}
    held = [max(stops[node_id] for node_id in nodes.holders(piece)) for piece in tails]
    # The last token is yet to be fed: its row draws the next one.
    return min([*held, record.context_stop + len(record.known_ids) - 1])


def _replicated(route: Route, node_id: str) -> bool:
    """Whether another node holds whatever this one holds."""
    return all(
        len(piece.node_ids) > 1
        for pieces in route.pieces
        for piece in pieces
        if node_id in piece.node_ids
    )


def _asked(
    nodes: NodeSession, members: Sequence[int], span: Span
) -> dict[str, dict[Span, list[int]]]:
    """Which spans of which layers to read from which node: each piece from its first holder."""
    asked: dict[str, dict[Span, list[int]]] = {}
    for layer in members:
        for piece in nodes.route.pieces[layer]:
            part = span.intersect(piece.span)
            if len(part):
                layers = asked.setdefault(nodes.holders(piece)[0], {}).setdefault(part, [])
                if layer not in layers:
                    layers.append(layer)
    return asked


class _Room:
    """Arrays for one layer's span, filled by blocks that may come twice."""

    def __init__(self, geometry: LayerGeometry, span: Span, dtype: np.dtype[np.generic]) -> None:
        self._span = span
        self._keys = np.zeros((geometry.kv_heads, len(span), geometry.head_dim), dtype)
        self._values = np.zeros((geometry.kv_heads, len(span), geometry.value_dim), dtype)
        self._filled = np.zeros((geometry.kv_heads, len(span)), bool)

    def put(self, block: KvBlock, axis: int) -> None:
        """Takes the part of a block that lies in the span."""
        common = self._span.intersect(block.span)
        source = slice(common.start - block.start, common.stop - block.start)
        target = slice(common.start - self._span.start, common.stop - self._span.start)
        heads = slice(block.kv_head_start, block.kv_head_start + block.keys.shape[1])
        self._keys[heads, target] = block.keys[axis][:, source]
        self._values[heads, target] = block.values[axis][:, source]
        self._filled[heads, target] = True

    def part(self, layer: int) -> ResidentPart:
        """The whole span; raises Unavailable where something is missing."""
        if not self._filled.all():
            head, position = np.argwhere(~self._filled)[0].tolist()
            raise Unavailable(
                f"the nodes did not return position {self._span.start + position} of layer "
                f"{layer}, KV head {head}; the context may still be filling or was dropped"
            )
        return ResidentPart(layer, self._span.start, self._keys, self._values)
