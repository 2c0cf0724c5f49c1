"""Several workers: who gets a session, and what the loss of one means for the others."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator

import pytest
from conftest import World, eventually, new_world, raised, running_world
from coordinator_doubles import FakeWorker, answer

from longreach.errors import Unavailable
from longreach.v1 import generation_pb2 as pb

TOKENS = list(range(1, 151))


@pytest.fixture
async def pair() -> AsyncGenerator[World, None]:
    world = new_world()
    world.workers["worker-1"] = FakeWorker(world.nodes, contexts=world.workers["worker-0"].contexts)
    async with running_world(world):
        yield world
    world.stop_doubles()


async def test_sessions_without_a_context_spread_over_the_workers(pair):
    for worker in pair.workers.values():
        worker.step_gate.clear()
    calls = [asyncio.create_task(pair.generate([i], max_tokens=2)) for i in range(1, 9)]
    await eventually(lambda: sum(len(w.opened) for w in pair.workers.values()) == 8)
    assert {name: len(w.opened) for name, w in pair.workers.items()} == {
        "worker-0": 4,
        "worker-1": 4,
    }
    for worker in pair.workers.values():
        worker.step_gate.set()
    replies = await asyncio.gather(*calls)
    assert [reply.token_ids for reply in replies] == [answer([i], 2) for i in range(1, 9)]
    used = Counter(reply.summary.worker_id for reply in replies)
    assert used == {"worker-0": 4, "worker-1": 4}


async def test_questions_go_to_the_worker_that_knows_the_context(pair):
    context = await pair.context(TOKENS)
    warm = next(name for name, w in pair.workers.items() if w.prefills)
    for _ in range(5):
        reply = await pair.generate([3], context_id=context.context_id, max_tokens=1)
        assert reply.summary.worker_id == warm
    pair.workers[warm].max_sessions = 0
    await pair.beat()
    other = await pair.generate([3], context_id=context.context_id, max_tokens=1)
    assert other.summary.worker_id != warm
    assert other.token_ids == answer([*TOKENS, 3], 1)


async def test_sessions_of_a_lost_worker_go_on_on_the_other(pair):
    for worker in pair.workers.values():
        worker.step_gate.clear()
    calls = [asyncio.create_task(pair.generate([i], max_tokens=4)) for i in (1, 2)]
    await eventually(lambda: all(w.steps for w in pair.workers.values()))
    pair.silent.add("worker-1")
    pair.workers["worker-1"].server.stop(0)
    pair.workers["worker-0"].step_gate.set()
    replies = await asyncio.gather(*calls)
    assert [reply.token_ids for reply in replies] == [answer([i], 4) for i in (1, 2)]
    assert {reply.summary.worker_id for reply in replies} == {"worker-0"}
    assert sorted(reply.summary.failovers for reply in replies) == [0, 1]
    for i in range(3):
        assert (await pair.generate([i], max_tokens=1)).summary.worker_id == "worker-0"


async def test_prefills_go_to_the_least_busy_worker(pair):
    for worker in pair.workers.values():
        worker.prefill_gate.clear()
    first = asyncio.create_task(pair.context([1, *TOKENS]))
    await eventually(lambda: sum(w.prefills for w in pair.workers.values()) == 1)
    second = asyncio.create_task(pair.context([2, *TOKENS]))
    await eventually(lambda: sum(w.prefills for w in pair.workers.values()) == 2)
    assert {w.prefills for w in pair.workers.values()} == {1}
    for worker in pair.workers.values():
        worker.prefill_gate.set()
    await asyncio.gather(first, second)


async def test_a_worker_that_takes_leave_hands_its_sessions_over(pair):
    calls = [
        asyncio.create_task(pair.generate([i], max_tokens=300, ignore_eos=True)) for i in (1, 2)
    ]
    await eventually(lambda: all(len(w.steps) > 5 for w in pair.workers.values()))
    await pair.leave("worker-1")
    await eventually(lambda: not pair.workers["worker-1"].sessions)
    replies = await asyncio.gather(*calls)
    assert [reply.token_ids for reply in replies] == [answer([i], 300) for i in (1, 2)]
    assert {reply.summary.worker_id for reply in replies} == {"worker-0"}
    assert sorted(reply.summary.failovers for reply in replies) == [0, 1]
    for i in range(3):
        assert (await pair.generate([i], max_tokens=1)).summary.worker_id == "worker-0"


async def test_the_only_worker_finishes_what_it_has_when_it_takes_leave(world):
    worker = world.workers["worker-0"]
    worker.step_gate.clear()
    call = asyncio.create_task(world.generate([1], max_tokens=4))
    await eventually(lambda: worker.steps)
    await world.leave("worker-0")
    worker.step_gate.set()
    reply = await call
    assert reply.token_ids == answer([1], 4)
    assert reply.summary.failovers == 0


async def test_without_any_worker_requests_say_so():
    world = new_world()
    world.silent.add("worker-0")
    async with running_world(world):
        for call in (world.generate([1], max_tokens=1), world.create(TOKENS)):
            error = await raised(call)
            assert isinstance(error, Unavailable)
            assert error.reason == "NO_WORKER"
    world.stop_doubles()


async def test_a_prefill_whose_worker_is_lost_begins_anew_on_the_other(pair):
    for worker in pair.workers.values():
        worker.prefill_gate.clear()
    storing = asyncio.create_task(pair.context(TOKENS))
    await eventually(lambda: any(w.prefills for w in pair.workers.values()))
    lost, other = sorted(pair.workers.values(), key=lambda worker: -worker.prefills)
    other.prefill_gate.set()
    lost.server.stop(0)
    context = await storing
    assert context.state == pb.CONTEXT_STATE_READY
    assert (lost.prefills, other.prefills) == (1, 1)
    assert all(context.context_id in node.dropped for node in pair.nodes.values())


async def test_a_prefill_that_every_attempt_loses_its_worker_of_fails(pair):
    for worker in pair.workers.values():
        worker.server.stop(0)
    error = await raised(pair.context(TOKENS))
    assert isinstance(error, Unavailable)
    listed = await pair.stub.ListContexts(pb.ListContextsRequest())
    assert [each.state for each in listed.contexts] == [pb.CONTEXT_STATE_FAILED]
