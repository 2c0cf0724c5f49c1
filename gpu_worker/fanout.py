"""Rows to shards to nodes: who is asked what, and what came back. It does no mathematics.

Each layer of a step is one message per node, written to all nodes before any reply is awaited; the
device attends the resident sets meanwhile. Attend is read-only, so what a node did not answer is
asked again of another node that holds the shard; what nobody answered is reported as missing.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from gpu_worker.methods.base import Collected, HeadPart, Retrieved, SessionQueries
from gpu_worker.routes import Piece, Route
from longreach import wire
from longreach.errors import (
    ConnectionLost,
    CoverageTooLow,
    LongreachError,
    StaleEpoch,
    Unavailable,
)
from longreach.rpc.retrieval import AttendStream
from longreach.types import (
    AttendResult,
    AttendRows,
    LayerGeometry,
    Span,
    StorageArray,
    WorkFigures,
)
from longreach.wire import NodeTiming

SUSPECT_S = 5.0
"""How long a node that failed is asked only where no other node holds the shard."""
REPLICA_AFTER_S = 2.0
"""How long to wait for a node before its rows go to another one that holds the shard."""
_TURNS_MAX = 20

T = TypeVar("T")


class NodeStream(Protocol):
    """The part of AttendStream that the fan-out uses."""

    @property
    def unsent(self) -> int:
        """Requests that have not left yet."""

    def submit(
        self, request: Any, timeout_s: float, on_done: Callable[[], None]
    ) -> asyncio.Future[Any]:
        """The reply to come; the request leaves when the loop turns next."""

    async def close(self) -> None:
        """Ends the stream."""


@dataclass(slots=True)
class NodeSession:
    """A session's route and the handles its nodes gave; `lost` nodes miss some of its tail."""

    route: Route
    handles: dict[str, int]
    lost: set[str] = field(default_factory=set)

    def holders(self, piece: Piece) -> list[str]:
        """Nodes that can answer for a piece, preferred one first."""
        return [n for n in piece.node_ids if n in self.handles and n not in self.lost]


@dataclass(slots=True)
class _Ask:
    """One piece of one session's rows: queries [rows, q_heads, head_dim] of the piece's heads."""

    number: int
    session: NodeSession
    asked: SessionQueries
    piece: Piece
    scope: Span
    q_head_start: int
    queries: StorageArray
    tried: set[str] = field(default_factory=set)
    repeated: bool = False
    answer: AttendResult | None = None
    error: LongreachError | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """Rows and query heads asked."""
        return self.queries.shape[0], self.queries.shape[1]

    def untried(self) -> list[str]:
        """Nodes that could still be asked."""
        return [n for n in self.session.holders(self.piece) if n not in self.tried]

    def may_go_on(self) -> bool:
        """Whether to ask again: another node or, once, the same ones over new connections."""
        if self.answer is not None or isinstance(self.error, StaleEpoch):
            return False
        lost_connection = isinstance(self.error, ConnectionLost)
        if not self.untried() and lost_connection and not self.repeated:
            self.repeated = True
            self.tried.clear()
        return bool(self.untried())

    def for_node(self, node_id: str) -> AttendRows:
        """The rows as that node knows the session."""
        return AttendRows(
            handle=self.session.handles[node_id],
            kv_head_start=self.piece.kv_head_start,
            kv_head_stop=self.piece.kv_head_stop,
            scope=self.scope,
            budget=self.asked.budget,
            queries=self.queries,
        )

    def take(self, node_id: str, result: AttendResult | LongreachError) -> None:
        """Keeps a node's result; an answer over fewer keys than asked counts as none."""
        if isinstance(result, LongreachError):
            self.error = result
        elif result.work.keys_covered < result.work.keys_in_scope:
            self.error = CoverageTooLow(
                f"node {node_id!r} holds {result.work.coverage:.1%} of {self.scope} of shard "
                f"{self.piece.shard_id!r}"
            )
        else:
            self.answer, self.error = result, None

    def report(self, into: Retrieved, row_bytes: int) -> None:
        """Adds this piece to its session's answer."""
        if self.answer is not None:
            into.parts.append(HeadPart(self.q_head_start, self.answer.partial))
            into.work = into.work + self.answer.work
            into.index_kinds.add(self.answer.index_kind)
            return
        heads = self.piece.kv_head_stop - self.piece.kv_head_start
        missing = self.rows[0] * heads * len(self.scope)
        into.work = into.work + WorkFigures(
            keys_in_scope=missing, bytes_in_scope=missing * row_bytes
        )
        into.error = self.error


@dataclass(slots=True)
class _Message:
    """A request on its way to one node."""

    node_id: str
    address: str
    asks: list[_Ask]
    reply: asyncio.Future[Any] | None = None


class FanOut:
    """Retriever over retrieval nodes. Used by the thread that owns the device only, with its loop.

    `open_stream` makes a node's stream from its address and the loop; tests pass their own.
    """

    def __init__(
        self,
        layers: Sequence[LayerGeometry],
        loop: asyncio.AbstractEventLoop,
        open_stream: Callable[[str, asyncio.AbstractEventLoop], NodeStream] = AttendStream,
    ) -> None:
        self.layers = tuple(layers)
        self._loop = loop
        self._open_stream = open_stream
        self._streams: dict[str, NodeStream] = {}
        self._sessions: dict[str, NodeSession] = {}
        self._suspect_until: dict[str, float] = {}
        self._request_ids = itertools.count(1)
        self._awaited: Sequence[asyncio.Future[Any]] = ()

    def attach(self, session_id: str, session: NodeSession) -> None:
        """Makes a session known."""
        self._sessions[session_id] = session

    def detach(self, session_id: str) -> None:
        """Forgets a session."""
        self._sessions.pop(session_id, None)

    def close(self) -> None:
        """Ends every stream."""
        for stream in self._streams.values():
            self.run(stream.close())
        self._streams.clear()

    def send(
        self,
        layer: int,
        queries: Sequence[SessionQueries],
        scale: float,
        softcap: float,
        deadline: float,
    ) -> _InFlight:
        """Writes one message to each node that holds some of the scopes."""
        group = self.layers[layer].group
        asks = []
        for number, asked in enumerate(queries):
            session = self._sessions[asked.session_id]
            for piece in session.route.pieces[layer]:
                scope = asked.scope.intersect(piece.span)
                if len(scope):
                    start, stop = piece.kv_head_start * group, piece.kv_head_stop * group
                    part = asked.queries[:, start:stop]
                    asks.append(_Ask(number, session, asked, piece, scope, start, part))
        flight = _InFlight(self, layer, scale, softcap, deadline, len(queries), asks)
        flight.write(asks)
        return flight

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Drives the loop until the work is done."""
        return self._loop.run_until_complete(work)

    def turn(self) -> None:
        """Turns the loop until what was submitted is with gRPC, whose own threads send it.

        Nearly always one turn. More are needed when gRPC has yet to say that the stream's previous
        write is complete; what does not leave soon (the cap on bytes in flight) leaves in `wait`.
        """
        for _ in range(_TURNS_MAX):
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()
            if not any(stream.unsent for stream in self._streams.values()):
                return

    def wait(self, replies: Sequence[asyncio.Future[Any]]) -> None:
        """Drives the loop until every reply has come, failed or expired.

        No task and no gather: starting and ending those costs more than the replies themselves.
        """
        self._awaited = replies
        while not all(reply.done() for reply in replies):
            self._loop.run_forever()
        self._awaited = ()

    def arrived(self) -> None:
        """Called by the streams when a reply has come, failed or expired."""
        if self._awaited and all(reply.done() for reply in self._awaited):
            self._loop.stop()

    def stream(self, address: str) -> NodeStream:
        """The one stream to a node."""
        if address not in self._streams:
            self._streams[address] = self._open_stream(address, self._loop)
        return self._streams[address]

    def address_messages(self, asks: Sequence[_Ask]) -> list[_Message]:
        """One message per node for the pieces; those that no node is left for get an error."""
        now = time.monotonic()
        messages: dict[str, _Message] = {}
        for ask in asks:
            left = ask.untried()
            if not left:
                ask.error = ask.error or Unavailable(
                    f"no node is left that holds shard {ask.piece.shard_id!r} for session "
                    f"{ask.asked.session_id!r}; open the session again"
                )
                continue
            fit = [node_id for node_id in left if self._suspect_until.get(node_id, 0.0) <= now]
            node_id = (fit or left)[0]
            ask.tried.add(node_id)
            if node_id not in messages:
                address = ask.session.route.addresses[node_id]
                messages[node_id] = _Message(node_id, address, [])
            messages[node_id].asks.append(ask)
        return list(messages.values())

    def next_request_id(self) -> int:
        """A number that no other request of this worker has."""
        return next(self._request_ids)

    def suspect(self, node_id: str) -> None:
        """Prefers other nodes for a while."""
        self._suspect_until[node_id] = time.monotonic() + SUSPECT_S


class _InFlight:
    """One layer under way on the nodes."""

    def __init__(
        self,
        fanout: FanOut,
        layer: int,
        scale: float,
        softcap: float,
        deadline: float,
        sessions: int,
        asks: list[_Ask],
    ) -> None:
        self._fanout = fanout
        self._layer = layer
        self._scale = scale
        self._softcap = softcap
        self._deadline = deadline
        self._sessions = sessions
        self._asks = asks
        self._messages: list[_Message] = []

    def write(self, asks: Sequence[_Ask]) -> None:
        """Addresses the pieces to nodes and sends; `collect` hears of failures."""
        self._messages = self._fanout.address_messages(asks)
        for message in self._messages:
            message.reply = self._submit(message)
        if self._messages:
            self._fanout.turn()

    def collect(self) -> Collected:
        """Takes every reply, asking other nodes for what failed while there are any."""
        slowest = NodeTiming()
        while self._messages:
            self._fanout.wait([message.reply for message in self._messages if message.reply])
            timings = [self._take(message) for message in self._messages]
            slowest = max([slowest, *timings], key=lambda timing: timing.total_s)
            self.write([ask for ask in self._asks if ask.may_go_on()])
        answers = [Retrieved() for _ in range(self._sessions)]
        geometry = self._fanout.layers[self._layer]
        for ask in self._asks:
            itemsize = ask.queries.itemsize
            row_bytes = (geometry.head_dim + geometry.value_dim) * itemsize
            ask.report(answers[ask.number], row_bytes)
        return Collected(answers, slowest)

    def _submit(self, message: _Message) -> asyncio.Future[Any] | None:
        """The reply to come; None when the message cannot be made, and then its asks say why."""
        request_id = self._fanout.next_request_id()
        rows = [ask.for_node(message.node_id) for ask in message.asks]
        try:
            request = wire.attend_request(request_id, self._layer, rows, self._scale, self._softcap)
            stream = self._fanout.stream(message.address)
            return stream.submit(request, self._patience_s(message), self._fanout.arrived)
        except LongreachError as error:
            self._fail(message, error)
            return None

    def _take(self, message: _Message) -> NodeTiming:
        """Takes one reply; returns the node's own times."""
        if message.reply is None:
            return NodeTiming()
        try:
            response = message.reply.result()
            results = wire.attend_results_from_proto(response, [ask.rows for ask in message.asks])
        except LongreachError as error:
            self._fail(message, error)
            return NodeTiming()
        for ask, result in zip(message.asks, results, strict=True):
            ask.take(message.node_id, result)
        return wire.node_timing_from_proto(response)

    def _fail(self, message: _Message, error: LongreachError) -> None:
        self._fanout.suspect(message.node_id)
        for ask in message.asks:
            ask.error = error

    def _patience_s(self, message: _Message) -> float:
        remaining = max(0.0, self._deadline - time.monotonic())
        replicated = all(ask.untried() for ask in message.asks)
        return min(remaining, REPLICA_AFTER_S) if replicated else remaining
