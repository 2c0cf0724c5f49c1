"""New KV on its way to the nodes, off the token path, and what they have acknowledged.

After each step every session sends one message to each node that keeps part of its tail. A position
counts as stored once all those nodes acknowledged it; the resident window is the retransmission
buffer. A node that cannot be reached is dropped from a session whose every shard has another node;
otherwise what it misses is sent again from the window.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gpu_worker.asks import NodeSession
from longreach.errors import LongreachError, ResourceExhausted, StaleEpoch, Unavailable
from longreach.rpc.retrieval import AppendStream
from longreach.types import AppendEntry, KvBlock, LayerGeometry, Shard, Span, StorageArray

RESEND_AFTER_S = 0.2
"""Pause before what a node failed to take is sent again."""
LEAVE_BEHIND_S = 1.0
"""How long a step waits for a node's acknowledgements where another node takes the same."""

LayerKv = Sequence[tuple[StorageArray, StorageArray]]
"""Keys [kv_heads, n, head_dim] and values of every layer, for the same positions."""
OnAck = Callable[[int, int, LongreachError | None], None]


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens of one session from position `start`; their KV is in `kv` at `packed`."""

    session_id: str
    start: int
    token_ids: tuple[int, ...]
    kv: LayerKv
    packed: slice


class TailStream(Protocol):
    """The part of AppendStream that is used here."""

    def submit(self, entries: Sequence[AppendEntry]) -> None:
        """Queues entries; returns at once."""

    def close(self) -> None:
        """Ends the stream."""


@dataclass(slots=True)
class _NodeTail:
    """A node's part of a session's tail: what it keeps and how far it has acknowledged."""

    node_id: str
    address: str
    handle: int
    shards: tuple[Shard, ...]
    acknowledged: int
    sent: int
    error: LongreachError | None = None
    retry_at: float = 0.0


@dataclass(slots=True)
class _Tail:
    epoch: int
    session: NodeSession
    nodes: list[_NodeTail]
    token_ids: list[int] = field(default_factory=list)
    start: int = 0


class Appends:
    """Tails of all sessions of a worker. Acknowledgements come from reader threads."""

    def __init__(
        self,
        layers: Sequence[LayerGeometry],
        open_stream: Callable[[str, OnAck], TailStream] = AppendStream,
    ) -> None:
        self._layers = tuple(layers)
        self._open_stream = open_stream
        self._streams: dict[str, TailStream] = {}
        self._tails: dict[str, _Tail] = {}
        self._by_handle: dict[tuple[str, int], _NodeTail] = {}
        self._changed = threading.Condition()

    def open(self, session_id: str, epoch: int, session: NodeSession, stop: int) -> None:
        """Begins a tail whose first `stop` positions every node holds."""
        nodes = [
            _NodeTail(node_id, session.route.addresses[node_id], handle, shards, stop, stop)
            for node_id, handle in session.handles.items()
            if node_id not in session.lost and (shards := session.route.tail_shards.get(node_id))
        ]
        with self._changed:
            self._tails[session_id] = _Tail(epoch, session, nodes, start=stop)
            for node in nodes:
                self._by_handle[node.address, node.handle] = node

    def close_session(self, session_id: str) -> None:
        """Forgets a tail; what is in flight is no longer waited for."""
        with self._changed:
            tail = self._tails.pop(session_id, None)
            for node in tail.nodes if tail else ():
                self._by_handle.pop((node.address, node.handle), None)

    def close(self) -> None:
        """Ends every stream, after what was submitted."""
        for stream in self._streams.values():
            stream.close()

    def submit(self, news: Sequence[NewTokens]) -> None:
        """Sends a step's new KV, one message to each node; never waits."""
        by_address: dict[str, list[AppendEntry]] = {}
        for new in news:
            tail = self._tails[new.session_id]
            tail.token_ids[new.start - tail.start :] = new.token_ids
            for node in tail.nodes:
                # A node that failed gets this with what it missed, when it is sent again.
                if node.sent == new.start and node.error is None:
                    node.sent = new.start + len(new.token_ids)
                    by_address.setdefault(node.address, []).append(self._entry(tail, node, new))
        for address, entries in by_address.items():
            self._stream(address).submit(entries)

    def require(
        self,
        session_id: str,
        stop: int,
        length: int,
        window: Callable[[Span], LayerKv],
        timeout_s: float,
    ) -> None:
        """Waits until every node of the tail has the positions below `stop`.

        What nodes failed to take up to `length` is sent again, read from the resident window. A
        node that is a second late is left behind where another one holds the same. Raises the
        node's error when it can never take it, Unavailable when the time runs out.
        """
        deadline = time.monotonic() + timeout_s
        leave_at = min(deadline, time.monotonic() + LEAVE_BEHIND_S)
        while True:
            self._resend(session_id, length, window)
            with self._changed:
                self._changed.wait_for(
                    lambda: self._acknowledged(session_id) >= stop or self._failed(session_id),
                    leave_at - time.monotonic(),
                )
                acknowledged = self._acknowledged(session_id)
                if acknowledged >= stop:
                    return
                late = time.monotonic() >= leave_at
                if late and not self._leave_behind(session_id, stop):
                    if time.monotonic() >= deadline:
                        raise Unavailable(
                            f"the nodes of session {session_id!r} acknowledged its tokens up to "
                            f"{acknowledged}, the step needs {stop}; nothing is lost, try again",
                            reason="TAIL_NOT_STORED",
                            retry_after_s=1.0,
                        )
                    leave_at = deadline  # They are the last that have it: worth all the patience.
                if not late:
                    self._changed.wait(RESEND_AFTER_S)

    def _leave_behind(self, session_id: str, stop: int) -> bool:
        """Drops nodes that are late; whether any was."""
        tail = self._tails[session_id]
        dropped = False
        for node in list(tail.nodes):
            if node.acknowledged < stop and tail.session.can_lose(node.node_id):
                self._lose(tail, node)
                dropped = True
        return dropped

    def _resend(self, session_id: str, length: int, window: Callable[[Span], LayerKv]) -> None:
        tail = self._tails[session_id]
        for node in list(tail.nodes):
            error = node.error
            if error is None:
                continue
            if isinstance(error, StaleEpoch):
                raise error
            if tail.session.can_lose(node.node_id):
                self._lose(tail, node)
            elif not _passing(error):
                raise error
            elif time.monotonic() >= node.retry_at:
                node.error = None
                node.sent = length
                missed = Span(node.acknowledged, length)
                if not len(missed):
                    continue
                ids = tail.token_ids[missed.start - tail.start : missed.stop - tail.start]
                new = NewTokens(session_id, missed.start, tuple(ids), window(missed), slice(None))
                self._stream(node.address).submit([self._entry(tail, node, new)])

    def acknowledged(self, session_id: str) -> int:
        """One past the last position that every node of the tail has."""
        with self._changed:
            return self._acknowledged(session_id)

    def lagging(self, session_id: str) -> tuple[str, ...]:
        """Nodes that miss some of the tail until the session is opened again."""
        return tuple(sorted(self._tails[session_id].session.lost))

    def _acknowledged(self, session_id: str) -> int:
        tail = self._tails[session_id]
        return min((node.acknowledged for node in tail.nodes), default=1 << 62)

    def _failed(self, session_id: str) -> bool:
        return any(node.error is not None for node in self._tails[session_id].nodes)

    def _entry(self, tail: _Tail, node: _NodeTail, new: NewTokens) -> AppendEntry:
        blocks = tuple(
            block for shard in node.shards for block in blocks_of(self._layers, shard, new)
        )
        return AppendEntry(node.handle, tail.epoch, new.start, new.token_ids, blocks)

    def _stream(self, address: str) -> TailStream:
        if address not in self._streams:

            def on_ack(handle: int, stop: int, error: LongreachError | None) -> None:
                self._on_ack(address, handle, stop, error)

            self._streams[address] = self._open_stream(address, on_ack)
        return self._streams[address]

    def _on_ack(self, address: str, handle: int, stop: int, error: LongreachError | None) -> None:
        with self._changed:
            node = self._by_handle.get((address, handle))
            if node is not None:
                if error is None:
                    node.acknowledged = max(node.acknowledged, stop)
                elif node.error is None:
                    node.error = error
                    node.retry_at = time.monotonic() + RESEND_AFTER_S
            self._changed.notify_all()

    def _lose(self, tail: _Tail, node: _NodeTail) -> None:
        with self._changed:
            tail.session.lost.add(node.node_id)
            tail.nodes.remove(node)
            self._by_handle.pop((node.address, node.handle), None)


def _passing(error: LongreachError) -> bool:
    """Whether sending again may help; a gap follows an entry that failed before it."""
    return isinstance(error, Unavailable | ResourceExhausted) or error.reason == "APPEND_GAP"


def blocks_of(layers: Sequence[LayerGeometry], shard: Shard, new: NewTokens) -> Iterator[KvBlock]:
    """The shard's layers and heads as blocks of layers of equal shape."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for layer in shard.layers:
        geometry = layers[layer]
        by_shape.setdefault((geometry.head_dim, geometry.value_dim), []).append(layer)
    part = (slice(shard.kv_head_start, shard.kv_head_stop), new.packed)
    for members in by_shape.values():
        yield KvBlock(
            tuple(members),
            shard.kv_head_start,
            new.start,
            np.stack([new.kv[layer][0][part] for layer in members]),
            np.stack([new.kv[layer][1][part] for layer in members]),
        )
