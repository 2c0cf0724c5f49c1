"""The coordinator over real gRPC, against doubles of a worker and two nodes."""

from __future__ import annotations

import asyncio

import grpc
from conftest import eventually, new_world, raised, running_world
from coordinator_doubles import MAX_POSITIONS, answer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.server import GENERATION
from longreach.errors import (
    Aborted,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from longreach.rpc.channels import aio_channel
from longreach.v1 import generation_pb2 as pb

TOKENS = list(range(1, 201))


async def test_a_context_is_stored_and_then_found(world):
    first = await world.create(TOKENS, name="letters")
    states = [reply.context.state for reply in first]
    assert states == sorted(states)
    assert states[-1] == pb.CONTEXT_STATE_READY
    context = first[-1].context
    assert context.tokens == 200
    assert context.name == "letters"
    assert context.prefill_s > 0
    assert not first[-1].found

    again = await world.create(TOKENS)
    assert [reply.found for reply in again] == [True]
    assert again[-1].context.context_id == context.context_id
    assert world.workers["worker-0"].prefills == 1


async def test_a_context_reports_its_index_from_the_nodes(world):
    context = await world.context(TOKENS)
    reply = await world.stub.GetContext(pb.GetContextRequest(context_id=context.context_id))
    assert reply.context.index_fraction == 1.0
    assert reply.context.index_kind == "flat"
    assert reply.context.index_bytes == 7 * len(context.shard_map.shards)


async def test_creators_of_the_same_context_share_one_prefill(world):
    worker = world.workers["worker-0"]
    worker.prefill_gate.clear()
    calls = [asyncio.create_task(world.create(TOKENS)) for _ in range(3)]
    await eventually(lambda: worker.prefills == 1)
    await asyncio.sleep(0.05)
    worker.prefill_gate.set()
    ends = [replies[-1].context for replies in await asyncio.gather(*calls)]
    assert {end.context_id for end in ends} == {ends[0].context_id}
    assert all(end.state == pb.CONTEXT_STATE_READY for end in ends)
    assert worker.prefills == 1


async def test_the_last_watcher_who_leaves_drops_the_context(world):
    worker = world.workers["worker-0"]
    worker.prefill_gate.clear()
    stay = asyncio.create_task(world.create(TOKENS))
    go = asyncio.create_task(world.create(TOKENS))
    await eventually(lambda: any(node.shards for node in world.nodes.values()))
    go.cancel()
    await asyncio.sleep(0.2)
    assert worker.cancelled_prefills == 0
    stay.cancel()
    await eventually(lambda: worker.cancelled_prefills == 1)
    await eventually(lambda: not any(node.shards for node in world.nodes.values()))
    listed = await world.stub.ListContexts(pb.ListContextsRequest())
    assert list(listed.contexts) == []

    worker.prefill_gate.set()
    assert (await world.context(TOKENS)).state == pb.CONTEXT_STATE_READY


async def test_a_failed_context_keeps_its_error_and_drops_its_kv(world):
    worker = world.workers["worker-0"]
    worker.nodes = {}  # the prefill breaks
    error = await raised(world.create(TOKENS))
    assert error.code == 13
    listed = await world.stub.ListContexts(pb.ListContextsRequest())
    assert [context.state for context in listed.contexts] == [pb.CONTEXT_STATE_FAILED]
    assert listed.contexts[0].error == error.message
    on_failed = await raised(
        world.generate([1], context_id=listed.contexts[0].context_id, max_tokens=1)
    )
    assert isinstance(on_failed, FailedPrecondition)
    worker.nodes = world.nodes
    assert (await world.context(TOKENS)).state == pb.CONTEXT_STATE_READY


async def test_a_context_that_does_not_fit_is_refused_with_bytes(world):
    for node in world.nodes.values():
        node.limit_bytes = 1000
    await world.beat()
    error = await raised(world.create(TOKENS))
    assert isinstance(error, ResourceExhausted)
    assert error.reason == "NODE_MEMORY"
    assert "1000 free" in error.message
    assert world.workers["worker-0"].prefills == 0


async def test_a_generation_over_a_context_continues_it(world):
    context = await world.context(TOKENS)
    reply = await world.generate([7, 8, 9], context_id=context.context_id, max_tokens=5)
    assert reply.token_ids == answer([*TOKENS, 7, 8, 9], 5)
    summary = reply.summary
    assert summary.finish_reason == pb.FINISH_REASON_LENGTH
    assert (summary.usage.context_tokens, summary.usage.prompt_tokens) == (200, 3)
    assert summary.usage.completion_tokens == 5
    assert summary.work.keys_in_scope == 4 * 10  # steps after the one that fed the question
    assert summary.prompt_work.keys_in_scope == 10
    assert summary.coverage == 1.0
    assert summary.worker_id == "worker-0"
    assert list(summary.index_kinds) == ["flat"]
    assert summary.full_kv_bytes == (200 + 3 + 5) * 4 * 2 * 16 * 4
    assert summary.resident_kv_bytes == 4096
    assert abs(summary.timing.wait_s - 5 * 0.002) < 1e-4
    assert summary.timing.first_token_s > 0


async def test_a_short_prompt_needs_no_context(world):
    reply = await world.generate(list(range(1, 100)), max_tokens=3)
    assert reply.token_ids == answer(list(range(1, 100)), 3)
    assert world.workers["worker-0"].prefills == 0
    longest = max(len(row.token_ids) for rows in world.workers["worker-0"].steps for row in rows)
    assert longest == 32


async def test_a_long_prompt_is_stored_once_and_found_by_the_next_request(world):
    prompt = [1 + i % 250 for i in range(1500)]
    first = await world.generate(prompt, max_tokens=4)
    assert first.token_ids == answer(prompt, 4)
    assert (first.summary.usage.context_tokens, first.summary.usage.prompt_tokens) == (1472, 28)
    second = await world.generate(prompt, max_tokens=4)
    assert second.token_ids == first.token_ids
    assert world.workers["worker-0"].prefills == 1


async def test_another_question_about_the_same_long_prompt_reuses_what_is_stored(world):
    document = [1 + i * i % 250 for i in range(2000)]
    first = await world.generate([*document, *range(1, 40)], max_tokens=4)
    assert first.summary.usage.context_tokens == 1984
    other = [*document, *range(200, 100, -1)]
    second = await world.generate(other, max_tokens=4)
    assert second.token_ids == answer(other, 4)
    assert second.summary.usage.context_tokens == 1984
    assert second.summary.usage.prompt_tokens == len(other) - 1984
    branch = [*document[:1200], *([7] * 300)]  # leaves the stored context half way
    third = await world.generate(branch, max_tokens=4)
    assert third.token_ids == answer(branch, 4)
    assert third.summary.usage.context_tokens == 1152
    assert world.workers["worker-0"].prefills == 1
    far = [*document[:200], *([9] * 1300)]  # too little in common: stored on its own
    fourth = await world.generate(far, max_tokens=4)
    assert fourth.token_ids == answer(far, 4)
    assert world.workers["worker-0"].prefills == 2


async def test_sessions_are_closed_on_the_worker_when_they_end(world):
    worker = world.workers["worker-0"]
    await asyncio.gather(*(world.generate([i], max_tokens=6) for i in range(1, 9)))
    await eventually(lambda: not worker.sessions)
    assert sorted(worker.opened) == sorted(worker.closed)
    assert len(worker.opened) == 8
    assert max(len(rows) for rows in worker.steps) <= worker.max_sessions


async def test_a_client_that_leaves_frees_its_session(world):
    worker = world.workers["worker-0"]
    request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[5]), max_tokens=3000, ignore_eos=True)
    call = world.stub.Generate(request)
    assert (await call.read()).tokens
    call.cancel()
    await eventually(lambda: worker.closed == worker.opened and worker.opened)
    status = await world.stub.GetStatus(pb.GetStatusRequest())
    assert status.running == 0
    assert sum(len(rows) for rows in worker.steps) < 3000


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue(world):
    worker = world.workers["worker-0"]
    worker.step_gate.clear()
    running = [asyncio.create_task(world.generate([i], max_tokens=1)) for i in range(1, 5)]
    await eventually(lambda: len(worker.opened) == 4)
    waiting = asyncio.create_task(world.generate([9], max_tokens=1))
    status = pb.GetStatusRequest()
    while (await world.stub.GetStatus(status)).waiting != 1:
        await asyncio.sleep(0.01)
    waiting.cancel()
    while (await world.stub.GetStatus(status)).waiting != 0:
        await asyncio.sleep(0.01)
    worker.step_gate.set()
    await asyncio.gather(*running)
    assert len(worker.opened) == 4


async def test_a_full_queue_refuses_with_a_hint_when_to_come_back():
    world = new_world(max_waiting=1)
    async with running_world(world):
        worker = world.workers["worker-0"]
        worker.max_sessions = 1
        await world.beat()
        worker.step_gate.clear()
        calls = [asyncio.create_task(world.generate([1], max_tokens=1))]
        await eventually(lambda: worker.opened)
        calls.append(asyncio.create_task(world.generate([2], max_tokens=1)))
        while (await world.stub.GetStatus(pb.GetStatusRequest())).waiting != 1:
            await asyncio.sleep(0.01)
        error = await raised(world.generate([3], max_tokens=1))
        assert isinstance(error, ResourceExhausted)
        assert error.retry_after_s >= 1
        worker.step_gate.set()
        await asyncio.gather(*calls)
    world.stop_doubles()


async def test_deleting_a_context_ends_its_generations_with_aborted(world):
    worker = world.workers["worker-0"]
    context = await world.context(TOKENS)
    worker.step_gate.clear()
    call = asyncio.create_task(world.generate([1], context_id=context.context_id, max_tokens=9))
    await eventually(lambda: worker.steps)
    deleting = world.stub.DeleteContext(pb.DeleteContextRequest(context_id=context.context_id))
    await asyncio.sleep(0.05)
    worker.step_gate.set()
    freed = (await deleting).bytes_freed
    assert freed == 100 * len(context.shard_map.shards)
    assert isinstance(await raised(call), Aborted)
    assert not worker.sessions
    assert not any(node.shards for node in world.nodes.values())
    gone = pb.GetContextRequest(context_id=context.context_id)
    assert isinstance(await raised(world.stub.GetContext(gone)), NotFound)


async def test_a_context_that_is_stored_again_while_it_is_deleted_is_stored_whole(world):
    context = await world.context(TOKENS)
    for _ in range(10):
        gone = pb.DeleteContextRequest(context_id=context.context_id)
        deleting = world.stub.DeleteContext(gone)
        stored = asyncio.create_task(world.context(TOKENS))
        await deleting
        assert (await stored).context_id == context.context_id
        listed = await world.stub.ListContexts(pb.ListContextsRequest())
        if not listed.contexts:  # it was found before the deletion began
            await world.context(TOKENS)
        held = {
            shard_id
            for node in world.nodes.values()
            for shard_id in node.shards[context.context_id]
        }
        assert held == {shard.shard_id for shard in context.shard_map.shards}


async def test_deleting_a_context_that_is_being_stored_ends_its_creation(world):
    worker = world.workers["worker-0"]
    worker.prefill_gate.clear()
    call = asyncio.create_task(world.create(TOKENS))
    await eventually(lambda: worker.prefills)
    listed = await world.stub.ListContexts(pb.ListContextsRequest())
    gone = pb.DeleteContextRequest(context_id=listed.contexts[0].context_id)
    await world.stub.DeleteContext(gone)
    assert isinstance(await raised(call), Aborted)
    await eventually(lambda: not any(node.shards for node in world.nodes.values()))
    await eventually(lambda: worker.cancelled_prefills == 1)


async def test_a_failed_row_ends_only_its_own_session(world):
    worker = world.workers["worker-0"]
    worker.step_gate.clear()
    calls = [asyncio.create_task(world.generate([i], max_tokens=8)) for i in (1, 2)]
    await eventually(lambda: len(worker.opened) == 2)
    worker.fail_rows_of.add(worker.opened[0])
    worker.step_gate.set()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(end, grpc.RpcError) for end in ends].count(True) == 1
    survivor = next(end for end in ends if not isinstance(end, BaseException))
    assert survivor.token_ids in (answer([1], 8), answer([2], 8))
    await eventually(lambda: not worker.sessions)


async def test_a_lost_worker_ends_its_sessions_with_unavailable(world):
    worker = world.workers["worker-0"]
    worker.step_gate.clear()
    call = asyncio.create_task(world.generate([1], max_tokens=8))
    await eventually(lambda: worker.steps)
    world.silent.add("worker-0")
    worker.server.stop(0)
    assert isinstance(await raised(call), Unavailable)
    status = await world.stub.GetStatus(pb.GetStatusRequest())
    states = {member.member_id: member.state for member in status.members}
    assert states["worker-0"] == "suspect"


async def test_a_lost_worker_is_unavailable_and_not_unknown(world):
    world.silent.add("worker-0")
    world.workers["worker-0"].server.stop(0)
    first = await raised(world.generate([1], max_tokens=1))
    assert isinstance(first, Unavailable)
    await raised(world.generate([1], max_tokens=1, model="tiny"))


async def test_a_session_is_opened_again_when_a_node_was_away_for_a_moment(world):
    worker = world.workers["worker-0"]
    worker.fail_opens = 2
    assert (await world.generate([4], max_tokens=3)).token_ids == answer([4], 3)
    worker.fail_opens = 1000
    assert isinstance(await raised(world.generate([4], max_tokens=3)), Unavailable)
    worker.fail_opens = 0
    await eventually(lambda: not worker.sessions)


async def test_the_services_are_ready_while_a_worker_and_a_node_are_alive():
    world = new_world()
    world.silent.add("worker-0")
    async with running_world(world), aio_channel(world.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def check(service):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            return reply.status

        assert await check("") == health_pb2.HealthCheckResponse.SERVING
        assert await check(GENERATION) == health_pb2.HealthCheckResponse.NOT_SERVING
        world.silent.clear()
        await world.beat()
        while await check(GENERATION) != health_pb2.HealthCheckResponse.SERVING:
            await asyncio.sleep(0.01)
    world.stop_doubles()


async def test_status_names_members_and_models(world):
    status = await world.stub.GetStatus(pb.GetStatusRequest())
    assert [member.member_id for member in status.members] == ["node-0", "node-1", "worker-0"]
    assert [member.kind for member in status.members] == ["node", "node", "worker"]
    assert {member.state for member in status.members} == {"alive"}
    assert list(status.models) == ["tiny"]
    assert status.version


async def test_wrong_requests_are_refused_with_numbers(world):
    context = await world.context(TOKENS)
    budget = pb.GenerateRequest().budget
    budget.top_k = 0
    matrix = [
        ({"token_ids": []}, InvalidRequest, "prompt is empty"),
        ({"token_ids": [256]}, InvalidRequest, "token id 256"),
        ({"token_ids": [1] * MAX_POSITIONS}, InvalidRequest, f"accepts {MAX_POSITIONS}"),
        ({"token_ids": [1], "max_tokens": 5000}, InvalidRequest, "5000 to generate"),
        ({"token_ids": [1], "context_id": "ctx-none"}, NotFound, "ctx-none"),
        ({"token_ids": [1], "model": "other"}, NotFound, "served: tiny"),
        ({"token_ids": [1], "sampling": {"temperature": -1.0}}, InvalidRequest, "temperature"),
        ({"token_ids": [1], "sampling": {"top_p": 1.5}}, InvalidRequest, "top_p"),
        ({"token_ids": [1], "budget": budget}, InvalidRequest, "budget"),
        ({"token_ids": [1], "min_coverage": 1.5}, InvalidRequest, "min_coverage"),
        ({"token_ids": [1], "top_logprobs": 99}, InvalidRequest, "top_logprobs"),
        ({"token_ids": [1], "stop_texts": [""]}, InvalidRequest, "stop text is empty"),
        ({"token_ids": [1], "stop_texts": ["x"] * 17}, InvalidRequest, "17 stop texts"),
        ({"token_ids": [1], "stop_texts": ["x"]}, FailedPrecondition, "/nowhere/tiny"),
        (
            {"token_ids": [1] * 3900, "context_id": context.context_id},
            InvalidRequest,
            "200 context tokens + 3900 prompt tokens",
        ),
    ]
    for fields, kind, words in matrix:
        error = await raised(world.generate(**({"max_tokens": 1} | fields)))
        assert isinstance(error, kind), (fields, error)
        assert words in error.message, error.message
    assert not world.workers["worker-0"].opened
    assert isinstance(await raised(world.create([])), InvalidRequest)
    assert isinstance(await raised(world.create([1], placement="best")), InvalidRequest)
    too_long = await raised(world.create([1] * MAX_POSITIONS))
    assert str(MAX_POSITIONS - 2) in too_long.message


async def test_text_and_tokens_do_not_mix_in_one_context(world):
    async def requests():
        yield pb.CreateContextRequest(text="words")
        yield pb.CreateContextRequest(tokens=pb.TokenIds(ids=[1]))

    async def call():
        return [reply async for reply in world.stub.CreateContext(requests())]

    assert "mixed" in (await raised(call())).message
