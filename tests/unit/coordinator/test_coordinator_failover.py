"""A generation whose worker is lost goes on elsewhere, and the client sees no gap and no repeat."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from conftest import World, eventually, new_world, raised, running_world
from coordinator_doubles import FakeWorker, answer

from coordinator.failover import HEAL_AFTER_S, PAUSES_S, Course, Healing, first_epoch
from coordinator.generation import FinishReason, Generation
from longreach.errors import (
    CoverageTooLow,
    Internal,
    InvalidRequest,
    NotFound,
    StaleEpoch,
    Unavailable,
)
from longreach.steps import StepRowResult, StepTiming
from longreach.v1 import generation_pb2 as pb

TOKENS = list(range(1, 151))
LOST = Unavailable("gone", reason="WORKER_LOST")


@pytest.fixture
async def pair() -> AsyncGenerator[World, None]:
    world = new_world()
    world.workers["worker-1"] = FakeWorker(world.nodes, contexts=world.workers["worker-0"].contexts)
    async with running_world(world):
        yield world
    world.stop_doubles()


class TestCourse:
    def test_pauses_grow_until_the_patience_is_spent(self):
        course = Course(2.0)
        now, pauses = 0.0, []
        while (pause_s := course.failed(LOST, "w", 7, now)) is not None:
            pauses.append(pause_s)
            now += pause_s + 0.01
        assert pauses[:4] == list(PAUSES_S)
        assert now <= 2.0 + PAUSES_S[-1]
        assert course.failovers == len(pauses)

    def test_progress_ends_an_outage(self):
        course = Course(1.0)
        assert course.failed(LOST, "w", 7, 0.0) == 0.0
        assert course.failed(LOST, "v", 8, 10.0) == 0.0
        assert course.avoid == {"v"}
        assert course.left_s(10.25) == 0.75
        assert course.failed(LOST, "w", 8, 11.5) is None

    def test_a_replay_that_fails_before_it_is_through_is_no_progress(self):
        course = Course(1.0)
        course.failed(LOST, "w", 100, 0.0)
        assert course.failed(LOST, "w", 60, 1.5) is None

    @pytest.mark.parametrize(
        "error",
        [InvalidRequest("bad"), Internal("bug"), StaleEpoch("taken over"), NotFound("context")],
    )
    def test_what_cannot_pass_ends_the_generation(self, error):
        assert Course(60.0).failed(error, "w", 0, 0.0) is None

    def test_a_worker_that_answered_is_not_avoided(self):
        course = Course(60.0)
        course.failed(CoverageTooLow("a node is gone"), "w", 3, 0.0)
        assert course.avoid == frozenset()

    def test_a_later_attempt_begins_above_every_epoch_of_an_earlier_one(self):
        assert first_epoch(0) == 1
        assert first_epoch(1) > first_epoch(0) + 1_000_000


class TestHealing:
    def test_a_session_is_opened_anew_when_a_node_that_it_lost_is_well(self):
        healing = Healing()
        assert not healing.due((), {"n0"}, 0.0)
        assert not healing.due(("n1",), {"n0", "n1"}, 1.0)
        assert not healing.due(("n1",), {"n0"}, 9.0)
        assert healing.due(("n1",), {"n0", "n1"}, 9.5)
        # It did not help: it waits for longer.
        assert not healing.due(("n1",), {"n0", "n1"}, 9.5 + 1.9 * HEAL_AFTER_S)
        assert healing.due(("n1",), {"n0", "n1"}, 9.5 + 2 * HEAL_AFTER_S)
        assert not healing.due((), {"n0", "n1"}, 100.0)
        assert not healing.due(("n1",), {"n1"}, 101.0)
        assert healing.due(("n1",), {"n1"}, 101.0 + HEAL_AFTER_S)


def generation(**fields):
    known = {"position": 100, "question": (5, 6, 7), "max_tokens": 400}
    return Generation("s", **(known | fields))


def feed(running, rows_max=512):
    """Feeds rows until a token is drawn; the rows as (position, tokens, sample)."""
    rows = []
    while True:
        row = running.next_row(rows_max)
        rows.append((row.position, len(row.token_ids), row.sample))
        result = StepRowResult("s", token_id=9 if row.sample else None)
        if running.accept(row, result, StepTiming(), 1.0) is not None:
            return rows


class TestGeneration:
    def test_what_the_nodes_lack_is_fed_again(self):
        running = generation()
        feed(running)
        feed(running)
        feed(running)
        assert running.position == 105
        running.stand_at(104)
        assert running.recomputed_tokens == 1
        assert not running.decoding
        assert feed(running) == [(104, 2, True)]
        assert running.tokens == 4
        assert running.decoding

    def test_a_step_whose_answer_was_lost_is_made_again(self):
        running = generation()
        feed(running)
        running.stand_at(103)  # where it stands: the token drawn last is fed next
        assert running.recomputed_tokens == 0
        assert running.decoding

    def test_rows_that_are_fed_again_end_where_the_window_moves(self):
        running = generation(generated=tuple(range(200)))
        running.stand_at(100, window=64)
        assert running.recomputed_tokens == 202
        rows = feed(running)
        # The question by itself, then up to each multiple of 64.
        assert rows == [(100, 3, False), (103, 25, False), (128, 64, False), (192, 64, False),
                        (256, 47, True)]  # fmt: skip
        assert running.tokens == 201

    def test_a_position_that_the_session_cannot_have_is_refused(self):
        for stop in (99, 103):
            with pytest.raises(Internal, match="yet to be fed"):
                generation().stand_at(stop)

    def test_tokens_that_the_client_has_count_and_may_have_ended_it(self):
        running = generation(generated=(1, 2, 0), stop_ids=(0,))
        assert running.tokens == 3
        assert running.finish_reason is FinishReason.STOP


async def test_tokens_after_a_failover_are_those_of_a_run_without_one(pair):
    context = await pair.context(TOKENS)
    warm = next(w for w in pair.workers.values() if w.prefills)
    call = asyncio.create_task(
        pair.generate([3], context_id=context.context_id, max_tokens=200, ignore_eos=True)
    )
    await eventually(lambda: len(warm.steps) > 20)
    warm.server.stop(0)
    reply = await call
    assert reply.token_ids == answer([*TOKENS, 3], 200)
    assert reply.summary.failovers == 1
    assert reply.summary.usage.completion_tokens == 200
    other = next(w for w in pair.workers.values() if w is not warm)
    await eventually(lambda: not other.sessions)


async def test_a_worker_that_is_frozen_is_left_within_a_moment(pair):
    context = await pair.context(TOKENS)
    warm = next(w for w in pair.workers.values() if w.prefills)
    warm.step_gate.clear()
    warm.frozen.set()
    reply = await pair.generate([3], context_id=context.context_id, max_tokens=5)
    assert reply.token_ids == answer([*TOKENS, 3], 5)
    assert reply.summary.failovers == 1
    # When it wakes up it is told that the session has left.
    warm.frozen.clear()
    warm.step_gate.set()
    await eventually(lambda: not warm.sessions)


async def test_a_slow_step_of_a_worker_that_answers_is_waited_for(pair):
    for worker in pair.workers.values():
        worker.step_gate.clear()
    call = asyncio.create_task(pair.generate([3], max_tokens=5))
    await asyncio.sleep(1.6)
    for worker in pair.workers.values():
        worker.step_gate.set()
    reply = await call
    assert reply.token_ids == answer([3], 5)
    assert reply.summary.failovers == 0


async def test_a_later_attempt_continues_from_what_the_client_has(world):
    whole = (await world.generate([3], max_tokens=20, ignore_eos=True)).token_ids
    resume = pb.Resume(key="k", attempt=1, token_ids=whole[:8])
    reply = await world.generate([3], max_tokens=20, ignore_eos=True, resume=resume)
    assert reply.token_ids == whole[8:]
    assert reply.summary.resumed == 1
    assert reply.summary.usage.completion_tokens == 20
    done = pb.Resume(key="k", attempt=2, token_ids=whole)
    reply = await world.generate([3], max_tokens=20, ignore_eos=True, resume=done)
    assert reply.token_ids == []
    assert reply.summary.finish_reason == pb.FINISH_REASON_LENGTH


async def test_a_later_attempt_ends_an_earlier_one_and_an_equal_one_is_refused(world):
    worker = world.workers["worker-0"]
    worker.step_gate.clear()
    first = pb.Resume(key="k")
    running = asyncio.create_task(world.generate([3], max_tokens=5, resume=first))
    await eventually(lambda: worker.steps)
    error = await raised(world.generate([3], max_tokens=5, resume=first))
    assert error.reason == "ALREADY_RUNNING"
    later = asyncio.create_task(
        world.generate([3], max_tokens=5, resume=pb.Resume(key="k", attempt=1))
    )
    assert isinstance(await raised(running), StaleEpoch)
    worker.step_gate.set()
    assert (await later).token_ids == answer([3], 5)


async def test_without_another_worker_the_request_fails_clearly(world):
    worker = world.workers["worker-0"]
    worker.step_gate.clear()
    call = asyncio.create_task(world.generate([3], max_tokens=5))
    await eventually(lambda: worker.steps)
    world.silent.add("worker-0")
    worker.server.stop(0)
    error = await raised(call)
    assert isinstance(error, Unavailable)
    assert error.reason == "NO_WORKER"
    assert "within 1 s" in error.message


async def test_sessions_follow_their_context_to_other_nodes(world):
    context = await world.context(TOKENS)
    worker = world.workers["worker-0"]
    call = asyncio.create_task(
        world.generate([3], context_id=context.context_id, max_tokens=300, ignore_eos=True)
    )
    await eventually(lambda: len(worker.steps) > 5)
    world.server.coordinator.sessions.route_changed("ctx-of-others")
    world.server.coordinator.sessions.route_changed(context.context_id)
    reply = await call
    assert reply.token_ids == answer([*TOKENS, 3], 300)
    assert reply.summary.failovers == 1
    assert len(worker.opened) == 2
