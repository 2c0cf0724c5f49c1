"""Rows to shards to nodes: who is asked what, and what came back. It does no mathematics.

Each layer of a step is one message per node, written to all nodes before any reply is awaited; the
device attends the resident sets meanwhile. Attend is read-only, so what a node is late to answer is
asked of a second one, the first answer wins, and what a node did not answer is asked again of
another; what nobody answered is reported as missing. `gpu_worker/node_health.py` decides when.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from gpu_worker.asks import Ask, Message, NodeSession, check_values
from gpu_worker.methods.base import Collected, Retrieved, SessionQueries
from gpu_worker.node_health import HedgeBudget, NodeHealth
from longreach import telemetry, wire
from longreach.errors import (
    ConnectionLost,
    DeadlineExceeded,
    LongreachError,
    Unavailable,
)
from longreach.rpc.retrieval import AttendStream
from longreach.telemetry.instruments import CounterSeries, HistogramSeries
from longreach.types import (
    LayerGeometry,
)
from longreach.wire import NodeTiming

_TURNS_MAX = 20
_GLANCE_S = 0.001
"""What came while the device computed is read first, before a request counts as late."""

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


@dataclass(frozen=True, slots=True)
class _Measures:
    """The metrics of one node."""

    seconds: HistogramSeries
    failures: CounterSeries


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
        self._health: dict[str, NodeHealth] = {}
        self._measures: dict[str, _Measures] = {}
        self._budget = HedgeBudget()
        self._request_ids = itertools.count(1)
        self._awaited: _InFlight | None = None

    def attach(self, session_id: str, session: NodeSession) -> None:
        """Makes a session known; the nodes that opened it just now are well."""
        self._sessions[session_id] = session
        for node_id in session.handles:
            self.health(node_id).renewed()

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
        traceparent: str = "",
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
                    asks.append(Ask(number, session, asked, piece, scope, start, part))
        flight = _InFlight(self, layer, scale, softcap, deadline, traceparent, len(queries), asks)
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

    def wait(self, flight: _InFlight) -> None:
        """Drives the loop until the flight has enough to go on with, or a reply of it is late.

        No task and no gather: starting and ending those costs more than the replies themselves.
        """
        if flight.enough():
            return
        self._awaited = flight
        late_at = max(flight.late_at(), time.monotonic() + _GLANCE_S)
        timer = None if late_at == math.inf else self._loop.call_at(late_at, self._loop.stop)
        while not flight.enough() and time.monotonic() < late_at:
            self._loop.run_forever()
        if timer is not None:
            timer.cancel()
        self._awaited = None

    def arrived(self, message: Message) -> None:
        """Called by the streams when a reply has come, failed or expired."""
        if message.left:
            self.settle(message)
        elif self._awaited is not None and self._awaited.enough():
            self._loop.stop()

    def settle(self, message: Message) -> None:
        """Learns from the end of a message how its node is."""
        health, now = message.health, time.monotonic()
        if message.late:
            message.late = False
            health.late -= 1
        failure = message.reply.exception() if message.reply is not None else None
        measures = self.measures(message.node_id)
        if failure is None:
            health.answered(message.size, now - message.sent_at)
            measures.seconds.record(now - message.sent_at)
            return
        measures.failures.add()
        if isinstance(failure, ConnectionLost | DeadlineExceeded):
            health.failed(message.sent_at, now)
        else:
            health.misled(now)

    def health(self, node_id: str) -> NodeHealth:
        """What is known of a node."""
        found = self._health.get(node_id)
        if found is None:
            found = self._health[node_id] = NodeHealth()
        return found

    def refused(self) -> int:
        """How many nodes are not asked now; any thread may ask this."""
        now = time.monotonic()
        return sum(health.refused(now) for health in list(self._health.values()))

    def measures(self, node_id: str) -> _Measures:
        """What is counted of a node."""
        found = self._measures.get(node_id)
        if found is None:
            found = self._measures[node_id] = _Measures(
                telemetry.histogram("retrieval_rpc_seconds").bind(node=node_id),
                telemetry.counter("retrieval_rpc_failures").bind(node=node_id),
            )
        return found

    def may_hedge(self) -> bool:
        """Takes leave for a request beyond the ordinary ones."""
        return self._budget.take()

    def stream(self, address: str) -> NodeStream:
        """The one stream to a node."""
        if address not in self._streams:
            self._streams[address] = self._open_stream(address, self._loop)
        return self._streams[address]

    def address_messages(self, asks: Sequence[Ask]) -> list[Message]:
        """One message per node for the pieces; those that no node is left for get an error."""
        now = time.monotonic()
        messages: dict[str, Message] = {}
        for ask in asks:
            node_id = self._choose(ask, now)
            if node_id is None:
                continue
            ask.tried.add(node_id)
            ask.under_way += 1
            if node_id not in messages:
                address = ask.session.route.addresses[node_id]
                messages[node_id] = Message(node_id, address, self.health(node_id))
            messages[node_id].asks.append(ask)
        return list(messages.values())

    def _choose(self, ask: Ask, now: float) -> str | None:
        """The node to ask: the first that is well, else the first there is."""
        left = ask.untried()
        if not left:
            ask.error = ask.error or Unavailable(
                f"no node is left that holds shard {ask.piece.shard_id!r} for session "
                f"{ask.asked.session_id!r}; open the session again"
            )
            return None
        asked = [node_id for node_id in left if not self.health(node_id).refused(now)]
        if not asked:
            ask.tried.update(left)
            ask.error = ask.error or Unavailable(
                f"connections to {', '.join(left)} failed again and again and are left alone for "
                "a while; open the session again"
            )
            return None
        fit = [node_id for node_id in asked if not self.health(node_id).avoided(now)]
        return (fit or asked)[0]

    def next_request_id(self) -> int:
        """A number that no other request of this worker has."""
        return next(self._request_ids)

    def sent(self, message: Message) -> None:
        """Counts a request that has left."""
        self._budget.asked()


class _InFlight:
    """One layer under way on the nodes."""

    def __init__(
        self,
        fanout: FanOut,
        layer: int,
        scale: float,
        softcap: float,
        deadline: float,
        traceparent: str,
        sessions: int,
        asks: list[Ask],
    ) -> None:
        self._fanout = fanout
        self._layer = layer
        self._scale = scale
        self._softcap = softcap
        self._deadline = deadline
        self._traceparent = traceparent
        self._sessions = sessions
        self._asks = asks
        self._messages: list[Message] = []
        self._hedged = False

    def write(self, asks: Sequence[Ask]) -> None:
        """Addresses the pieces to nodes and sends; `collect` hears of failures."""
        messages = self._fanout.address_messages(asks)
        for message in messages:
            message.reply = self._submit(message)
        self._messages += messages
        if messages:
            self._fanout.turn()

    def collect(self) -> Collected:
        """Takes every reply, asking other nodes for what failed or is late while there are any."""
        slowest = NodeTiming()
        while self._messages:
            self._fanout.wait(self)
            done = [message for message in self._messages if message.done]
            timings = [self._take(message) for message in done]
            slowest = max([slowest, *timings], key=lambda timing: timing.total_s)
            self._messages = [m for m in self._messages if not m.done and not self._leave(m)]
            self._hedge()
            self.write([ask for ask in self._asks if ask.may_go_on()])
        answers = [Retrieved() for _ in range(self._sessions)]
        geometry = self._fanout.layers[self._layer]
        for ask in self._asks:
            itemsize = ask.queries.itemsize
            row_bytes = (geometry.head_dim + geometry.value_dim) * itemsize
            ask.report(answers[ask.number], row_bytes)
        return Collected(answers, slowest)

    def enough(self) -> bool:
        """Whether `collect` has something to do: every reply, or one where two nodes were asked."""
        if self._hedged:
            return any(message.done for message in self._messages)
        return all(message.done for message in self._messages)

    def late_at(self) -> float:
        """When the next message counts as late."""
        return min((message.late_at for message in self._messages), default=math.inf)

    def _hedge(self) -> None:
        """Asks a second node for what is late, and prefers others meanwhile."""
        now = time.monotonic()
        for message in [m for m in self._messages if m.late_at <= now]:
            message.late_at = math.inf
            message.late = True
            message.health.late += 1
            waiting = [ask for ask in message.asks if ask.answer is None]
            if waiting and self._fanout.may_hedge():
                self._hedged = True
                for ask in waiting:
                    ask.hedged += 1
                self.write(waiting)

    def _submit(self, message: Message) -> asyncio.Future[Any] | None:
        """The reply to come; None when the message cannot be made, and then its asks say why."""
        request_id = self._fanout.next_request_id()
        rows = [ask.for_node(message.node_id) for ask in message.asks]
        message.size = sum(len(each.queries) * len(each.scope) for each in rows).bit_length()
        now = message.sent_at = time.monotonic()
        replicated = all(ask.untried() for ask in message.asks)
        if replicated:
            message.late_at = now + message.health.hedge_after_s(message.size)
        patience_s = message.health.patience_s(message.size, replicated=replicated)
        remaining_s = max(0.0, self._deadline - now)
        timeout_s = remaining_s if patience_s is None else min(remaining_s, patience_s)
        try:
            request = wire.attend_request(
                request_id, self._layer, rows, self._scale, self._softcap, self._traceparent
            )
            stream = self._fanout.stream(message.address)
            reply = stream.submit(
                request, timeout_s, functools.partial(self._fanout.arrived, message)
            )
        except LongreachError as error:
            self._fail(message, error)
            return None
        self._fanout.sent(message)
        return reply

    def _take(self, message: Message) -> NodeTiming:
        """Takes one reply; returns the node's own times."""
        for ask in message.asks:
            ask.under_way -= 1
        if message.reply is None:
            return NodeTiming()
        self._fanout.settle(message)
        try:
            response = message.reply.result()
            results = wire.attend_results_from_proto(response, [ask.rows for ask in message.asks])
            check_values(results, self._fanout.layers[self._layer].value_dim, message.node_id)
        except LongreachError as error:
            if message.reply.exception() is None:  # Else `settle` has counted it.
                self._fanout.measures(message.node_id).failures.add()
            self._fail(message, error)
            return NodeTiming()
        for ask, result in zip(message.asks, results, strict=True):
            ask.take(message.node_id, result)
        return wire.node_timing_from_proto(response)

    def _leave(self, message: Message) -> bool:
        """Whether another node has answered all that a message asks; its reply then only tells how
        the node is."""
        if any(ask.answer is None for ask in message.asks):
            return False
        message.left = True
        return True

    def _fail(self, message: Message, error: LongreachError) -> None:
        if not isinstance(error, ConnectionLost | DeadlineExceeded):
            message.health.misled(time.monotonic())
        for ask in message.asks:
            if ask.answer is None:
                ask.error = error
