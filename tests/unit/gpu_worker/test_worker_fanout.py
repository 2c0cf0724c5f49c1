"""The fan-out over scripted nodes that speak the real messages: replicas and what is missing."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from gpu_worker import node_health
from gpu_worker.asks import NodeSession
from gpu_worker.fanout import FanOut
from gpu_worker.methods.base import Collected, SessionQueries
from gpu_worker.routes import plan_route
from longreach import wire
from longreach.attention import merge, partial_attention
from longreach.errors import (
    ConnectionLost,
    CoverageTooLow,
    DeadlineExceeded,
    LongreachError,
    NotFound,
    StaleEpoch,
    Unavailable,
)
from longreach.types import (
    AttendResult,
    AttendRows,
    Budget,
    LayerGeometry,
    PartialAttention,
    Shard,
    ShardMap,
    Span,
    WorkFigures,
)
from longreach.wire import NodeTiming
from tests.unit.telemetry.measured import measured

LAYERS = (LayerGeometry(0, 8, 4, 16, 12),)
SCALE = 0.25
RNG = np.random.default_rng(0)
KEYS = RNG.normal(size=(4, 200, 16)).astype(np.float32)
VALUES = RNG.normal(size=(4, 200, 12)).astype(np.float32)


def attend(queries: np.ndarray, scope: Span, heads: tuple[int, int] = (0, 4)) -> PartialAttention:
    rows = (slice(*heads), slice(scope.start, scope.stop))
    return partial_attention(queries, KEYS[rows], VALUES[rows], SCALE)


class ScriptedNode:
    """A node's Attend stream that answers exactly, until told otherwise."""

    unsent = 0

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.asked: list[AttendRows] = []
        self.messages = 0
        self.submit_error: LongreachError | None = None
        self.silent = False
        self.delay_s = 0.0
        self.answer: Callable[[AttendRows], AttendResult | LongreachError] = self.exact

    def exact(self, rows: AttendRows) -> AttendResult:
        heads = (rows.kv_head_start, rows.kv_head_stop)
        count = len(rows.queries) * (heads[1] - heads[0]) * len(rows.scope)
        work = WorkFigures(count, count, 0, count, count * 112, count * 112, count)
        return AttendResult(attend(np.asarray(rows.queries), rows.scope, heads), work, "flat")

    def submit(
        self, request: Any, timeout_s: float, on_done: Callable[[], None]
    ) -> asyncio.Future[Any]:
        self.messages += 1
        reply = self.loop.create_future()
        reply.add_done_callback(lambda _: on_done())
        if self.silent:
            error = DeadlineExceeded("the node is silent")
            self.loop.call_later(timeout_s, reply.set_exception, error)
        elif self.submit_error is not None:
            reply.set_exception(self.submit_error)
        elif self.delay_s:
            self.loop.call_later(self.delay_s, reply.set_result, self.reply_to(request))
        else:
            self.loop.call_soon(reply.set_result, self.reply_to(request))
        return reply

    def reply_to(self, request: Any) -> Any:
        rows = wire.attend_rows_from_proto(request)
        self.asked.extend(rows)
        shapes = [(r.queries.shape[0], r.queries.shape[1], 12) for r in rows]
        return wire.attend_response(
            request.request_id, [self.answer(r) for r in rows], shapes, NodeTiming(attend_s=0.002)
        )

    async def close(self) -> None:
        pass


class Tier:
    """Three scripted nodes and a fan-out over them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.nodes = {f"n{i}": ScriptedNode(loop) for i in range(3)}
        self.fanout = FanOut(LAYERS, loop, lambda address, loop: self.nodes[address])

    def attach(self, *shards: Shard, session_id: str = "s") -> NodeSession:
        addresses = {name: name for name in self.nodes}
        route = plan_route(ShardMap(shards, addresses, "test"), LAYERS, 200)
        handles = {name: 10 * (i + 1) for i, name in enumerate(self.nodes)}
        session = NodeSession(route, handles)
        self.fanout.attach(session_id, session)
        return session

    def ask(self, *queries: SessionQueries, deadline_s: float = 5.0) -> Collected:
        deadline = time.monotonic() + deadline_s
        return self.fanout.send(0, queries, SCALE, 0.0, deadline).collect()


@pytest.fixture
def tier() -> Iterator[Tier]:
    loop = asyncio.new_event_loop()
    yield Tier(loop)
    loop.close()


def shard(
    name: str,
    nodes: tuple[str, ...],
    span: tuple[int, int] = (0, 200),
    heads: tuple[int, int] = (0, 4),
) -> Shard:
    return Shard(name, Span(*span), (0,), *heads, nodes)


def queries(
    session_id: str = "s", rows: int = 2, scope: tuple[int, int] = (8, 190)
) -> SessionQueries:
    drawn = np.random.default_rng(rows).normal(size=(rows, 8, 16)).astype(np.float32)
    return SessionQueries(session_id, drawn, Span(*scope), Budget(exact=True))


def merged(collected: Collected, number: int = 0) -> PartialAttention:
    """The answer of one session over all heads, put together as the specification says."""
    by_heads: dict[int, list[PartialAttention]] = {}
    for part in collected.answers[number].parts:
        by_heads.setdefault(part.q_head_start, []).append(part.partial)
    whole = [merge(parts) for _, parts in sorted(by_heads.items())]
    return PartialAttention(
        np.concatenate([part.output for part in whole], 1),
        np.concatenate([part.lse for part in whole], 1),
    )


def assert_exact(collected: Collected, asked: SessionQueries, number: int = 0) -> None:
    got, want = merged(collected, number), attend(np.asarray(asked.queries), asked.scope)
    np.testing.assert_allclose(got.output, want.output, atol=1e-5)
    np.testing.assert_allclose(got.lse, want.lse, atol=1e-5)
    assert collected.answers[number].error is None
    assert collected.answers[number].work.coverage == 1.0


def test_spans_and_heads_on_many_nodes_are_put_together(tier: Tier) -> None:
    tier.attach(
        shard("a", ("n0",), (0, 64), (0, 1)),
        shard("b", ("n1",), (64, 200), (0, 1)),
        shard("c", ("n1",), (0, 128), (1, 4)),
        shard("d", ("n2",), (128, 200), (1, 4)),
    )
    asked = queries()
    assert_exact(tier.ask(asked), asked)
    assert [node.messages for node in tier.nodes.values()] == [1, 1, 1]


def test_sessions_share_one_message_per_node_and_keep_their_own_answers(tier: Tier) -> None:
    tier.attach(shard("a", ("n0",)))
    tier.attach(shard("b", ("n0",)), session_id="t")
    asked = [queries(rows=1), queries("t", rows=5, scope=(8, 64))]
    collected = tier.ask(*asked)
    for number, each in enumerate(asked):
        assert_exact(collected, each, number)
    assert tier.nodes["n0"].messages == 1
    assert collected.slowest.total_s == pytest.approx(0.002)


def test_pieces_outside_the_scope_are_not_asked(tier: Tier) -> None:
    tier.attach(shard("a", ("n0",), (0, 64)), shard("b", ("n1",), (64, 200)))
    asked = queries(scope=(8, 64))
    assert_exact(tier.ask(asked), asked)
    assert tier.nodes["n1"].messages == 0


def test_a_lost_connection_is_tried_once_more_where_there_is_no_replica(tier: Tier) -> None:
    tier.attach(shard("a", ("n0",)))
    node = tier.nodes["n0"]
    errors: list[LongreachError | None] = [ConnectionLost("the stream broke"), None]

    def submit(request: Any, *rest: Any) -> asyncio.Future[Any]:
        node.submit_error = errors.pop(0)
        return ScriptedNode.submit(node, request, *rest)

    node.submit = submit  # type: ignore[method-assign]
    asked = queries()
    assert_exact(tier.ask(asked), asked)
    assert node.messages == 2


@pytest.mark.parametrize("how", ["write", "row", "short"])
def test_what_a_node_does_not_answer_is_asked_of_its_replica(tier: Tier, how: str) -> None:
    tier.attach(shard("a", ("n0", "n1")))
    broken = tier.nodes["n0"]
    if how == "write":
        broken.submit_error = Unavailable("n0 is gone")
    elif how == "row":
        broken.answer = lambda rows: Unavailable("n0 has no memory left")
    else:  # an answer over fewer keys than were asked for
        broken.answer = lambda rows: AttendResult(
            broken.exact(rows).partial, WorkFigures(keys_in_scope=100, keys_covered=99), "flat"
        )
    asked = queries()
    assert_exact(tier.ask(asked), asked)
    assert tier.nodes["n1"].messages == 1


def test_a_silent_node_is_given_up_for_its_replica_and_avoided_for_a_while(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_health, "HEDGE_S_UNKNOWN", 10.0)
    monkeypatch.setattr(node_health, "DEADLINE_S_UNKNOWN", 0.01)
    tier.attach(shard("a", ("n0", "n1")))
    tier.nodes["n0"].silent = True
    asked = queries()
    for _ in range(3):
        assert_exact(tier.ask(asked), asked)
    assert tier.nodes["n0"].messages == 1
    assert tier.nodes["n1"].messages == 3


def test_a_late_request_goes_to_a_second_node_and_the_first_answer_wins(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_health, "HEDGE_S_UNKNOWN", 0.02)
    tier.attach(shard("a", ("n0", "n1")))
    late = tier.nodes["n0"]
    late.delay_s = 0.15
    asked = queries()
    began = time.monotonic()
    collected = tier.ask(asked)
    assert_exact(collected, asked)
    assert time.monotonic() - began < 0.15
    assert collected.answers[0].hedged_requests == 1
    # While its answer is out, the other one is asked at once.
    again = tier.ask(asked)
    assert_exact(again, asked)
    assert again.answers[0].hedged_requests == 0
    assert (late.messages, tier.nodes["n1"].messages) == (1, 2)
    # When it has come, the node is as good as before.
    tier.loop.run_until_complete(asyncio.sleep(0.2))
    late.delay_s = 0.0
    assert_exact(tier.ask(asked), asked)
    assert late.messages == 2


def test_both_answers_of_a_hedged_request_count_once(
    tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_health, "HEDGE_S_UNKNOWN", 0.02)
    tier.attach(shard("a", ("n0", "n1")))
    tier.nodes["n0"].delay_s = tier.nodes["n1"].delay_s = 0.05
    asked = queries()
    collected = tier.ask(asked)
    assert_exact(collected, asked)
    work = collected.answers[0].work
    assert work.keys_in_scope == work.keys_covered == 2 * 4 * len(asked.scope)


def test_hedging_stays_within_its_budget(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_health, "HEDGE_S_UNKNOWN", 0.0)
    monkeypatch.setattr(node_health, "HEDGE_S_MIN", 0.0)
    monkeypatch.setattr(node_health.NodeHealth, "hedge_after_s", lambda self, size: 0.0)
    tier.attach(shard("a", ("n0", "n1")))
    for node in tier.nodes.values():
        node.delay_s = 0.004
    asked = queries()
    hedged = sum(tier.ask(asked).answers[0].hedged_requests for _ in range(60))
    total = sum(node.messages for node in tier.nodes.values())
    assert 8 <= hedged <= 8 + 0.02 * total


def test_an_answer_that_is_no_number_is_asked_of_another_node(tier: Tier) -> None:
    tier.attach(shard("a", ("n0", "n1")))
    broken = tier.nodes["n0"]

    def spoil(rows: AttendRows) -> AttendResult:
        result = broken.exact(rows)
        output = result.partial.output.copy()
        output[0, 0, 3] = np.nan
        return dataclasses.replace(result, partial=PartialAttention(output, result.partial.lse))

    broken.answer = spoil
    asked = queries()
    assert_exact(tier.ask(asked), asked)
    assert_exact(tier.ask(asked), asked)
    assert broken.messages == 1  # Others are preferred for a while.


def test_a_node_that_lost_its_memory_is_asked_once(tier: Tier) -> None:
    session = tier.attach(shard("a", ("n0", "n1")))
    tier.nodes["n0"].answer = lambda rows: NotFound("who?", reason="UNKNOWN_HANDLE")
    asked = queries()
    for _ in range(2):
        assert_exact(tier.ask(asked), asked)
    assert tier.nodes["n0"].messages == 1
    assert session.lost == {"n0"}


def test_connections_that_fail_again_and_again_are_left_alone(tier: Tier) -> None:
    tier.attach(shard("a", ("n0",)))
    node = tier.nodes["n0"]
    node.submit_error = ConnectionLost("refused")
    asked = queries()
    for _ in range(4):
        assert tier.ask(asked).answers[0].error is not None
    assert node.messages == node_health.FAILURES_MAX
    # A session that it opens is a sign of life.
    node.submit_error = None
    tier.attach(shard("a", ("n0",)))
    assert_exact(tier.ask(asked), asked)


@pytest.mark.parametrize("how", ["lost", "refused", "no number"])
def test_each_answer_and_each_failure_is_counted_once_for_its_node(tier: Tier, how: str) -> None:
    tier.attach(shard("a", ("n0", "n1")))
    broken = tier.nodes["n0"]
    if how == "lost":
        broken.submit_error = ConnectionLost("refused")
    elif how == "refused":
        broken.submit_error = Unavailable("n0 is full")
    else:
        spoilt = PartialAttention(
            np.full((2, 8, 12), np.nan, np.float32), np.zeros((2, 8), np.float32)
        )
        broken.answer = lambda rows: dataclasses.replace(broken.exact(rows), partial=spoilt)
    with measured("worker") as read:
        asked = queries()
        assert_exact(tier.ask(asked), asked)
        assert read("retrieval_rpc_failures", node="n0") == 1
        assert read("retrieval_rpc_failures", node="n1") == 0
        assert read("retrieval_rpc_seconds", node="n1") == 1
        assert read("retrieval_rpc_seconds", node="n0") == (how == "no number")


def test_nodes_that_are_left_alone_are_counted(tier: Tier) -> None:
    tier.attach(shard("a", ("n0",)))
    tier.nodes["n0"].submit_error = ConnectionLost("refused")
    assert tier.fanout.refused() == 0
    for _ in range(4):
        tier.ask(queries())
    assert tier.fanout.refused() == 1


def test_a_suspect_node_is_still_asked_where_it_is_the_only_one(tier: Tier) -> None:
    tier.attach(shard("a", ("n0",)))
    tier.nodes["n0"].submit_error = Unavailable("n0 restarts")
    assert tier.ask(queries()).answers[0].error is not None
    tier.nodes["n0"].submit_error = None
    asked = queries()
    assert_exact(tier.ask(asked), asked)


def test_what_nobody_answers_is_counted_as_missing(tier: Tier) -> None:
    tier.attach(shard("a", ("n0",), (0, 64)), shard("b", ("n1",), (64, 200)))
    tier.nodes["n1"].submit_error = Unavailable("n1 is gone")
    answer = tier.ask(queries(rows=2)).answers[0]
    assert isinstance(answer.error, Unavailable)
    assert len(answer.parts) == 1
    assert answer.work.keys_in_scope == 2 * 4 * (190 - 8)
    assert answer.work.keys_covered == 2 * 4 * (64 - 8)
    assert answer.work.bytes_in_scope == answer.work.keys_in_scope * (16 + 12) * 4


def test_an_answer_over_too_few_keys_is_never_merged(tier: Tier) -> None:
    tier.attach(shard("a", ("n0",)))
    node = tier.nodes["n0"]
    node.answer = lambda rows: AttendResult(
        node.exact(rows).partial, WorkFigures(keys_in_scope=100, keys_covered=60), "flat"
    )
    answer = tier.ask(queries()).answers[0]
    assert isinstance(answer.error, CoverageTooLow)
    assert not answer.parts
    assert answer.work.keys_covered == 0


def test_a_writer_that_was_fenced_off_does_not_ask_replicas(tier: Tier) -> None:
    tier.attach(shard("a", ("n0", "n1")))
    tier.nodes["n0"].answer = lambda rows: StaleEpoch("epoch 1 is older than 2")
    assert isinstance(tier.ask(queries()).answers[0].error, StaleEpoch)
    assert tier.nodes["n1"].messages == 0


def test_a_node_that_lost_part_of_the_tail_is_not_asked(tier: Tier) -> None:
    session = tier.attach(shard("a", ("n0", "n1")))
    session.lost.add("n0")
    asked = queries()
    assert_exact(tier.ask(asked), asked)
    assert tier.nodes["n0"].messages == 0
    session.lost.add("n1")
    answer = tier.ask(asked).answers[0]
    assert isinstance(answer.error, Unavailable)
    assert "open the session again" in answer.error.message


def test_the_deadline_bounds_the_wait_for_a_silent_node(tier: Tier) -> None:
    tier.attach(shard("a", ("n0",)))
    tier.nodes["n0"].silent = True
    answer = tier.ask(queries(), deadline_s=0.02).answers[0]
    assert isinstance(answer.error, DeadlineExceeded)
