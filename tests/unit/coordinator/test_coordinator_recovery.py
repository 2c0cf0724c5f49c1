"""What a coordinator knows after restarts: its own, and its nodes'."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil

from conftest import eventually, new_world, raised, running_world
from coordinator_doubles import FakeSession, answer

from coordinator.catalog.base import ContextState
from coordinator.catalog.sqlite import SqliteCatalog
from longreach.errors import NotFound, Unavailable
from longreach.types import Identity
from longreach.v1 import generation_pb2 as pb

TOKENS = list(range(1, 131))


async def _states(world):
    listed = await world.stub.ListContexts(pb.ListContextsRequest())
    return {context.context_id: context.state for context in listed.contexts}


async def _becomes(world, context_id, state):
    async with asyncio.timeout(10):
        while (await _states(world)).get(context_id) != state:
            await asyncio.sleep(0.02)


async def test_contexts_outlive_the_coordinator(tmp_path):
    world = new_world(data_dir=str(tmp_path))
    async with running_world(world):
        context = await world.context(TOKENS, name="kept")
    async with running_world(world):
        await _becomes(world, context.context_id, pb.CONTEXT_STATE_READY)
        reply = await world.generate([3], context_id=context.context_id, max_tokens=2)
        assert reply.token_ids == answer([*TOKENS, 3], 2)
        assert (await world.create(TOKENS))[-1].found
    assert world.workers["worker-0"].prefills == 1
    world.stop_doubles()


async def test_a_context_is_unavailable_until_all_its_nodes_are_back(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.settling.PATIENCE_S", 0.1)
    world = new_world(data_dir=str(tmp_path))
    async with running_world(world):
        context = await world.context(TOKENS)
    world.silent.add("node-1")
    async with running_world(world):
        error = await raised(world.generate([3], context_id=context.context_id, max_tokens=1))
        assert isinstance(error, Unavailable)
        assert "node-1" in error.message
        world.silent.clear()
        await _becomes(world, context.context_id, pb.CONTEXT_STATE_READY)
    world.stop_doubles()


async def test_a_prefill_that_the_coordinator_did_not_outlive_has_failed(tmp_path):
    world = new_world(data_dir=str(tmp_path))
    worker = world.workers["worker-0"]
    async with running_world(world):
        context = await world.context(TOKENS)
    catalog = SqliteCatalog(str(tmp_path))
    record = await catalog.get(context.context_id)
    await catalog.put(dataclasses.replace(record, state=ContextState.FILLING))
    await catalog.close()
    async with running_world(world):
        await _becomes(world, context.context_id, pb.CONTEXT_STATE_FAILED)
        await eventually(lambda: not any(node.shards for node in world.nodes.values()))
        assert (await world.context(TOKENS)).state == pb.CONTEXT_STATE_READY
    assert worker.prefills == 2
    world.stop_doubles()


async def test_requests_right_after_a_restart_wait_for_nodes_to_register(tmp_path):
    world = new_world(data_dir=str(tmp_path))
    async with running_world(world):
        context = await world.context(TOKENS)
    world.silent.add("node-1")
    async with running_world(world):
        found = asyncio.create_task(world.create(TOKENS))
        answered = asyncio.create_task(
            world.generate([3], context_id=context.context_id, max_tokens=2)
        )
        await asyncio.sleep(0.1)
        world.silent.clear()
        assert (await found)[-1].found
        assert (await answered).token_ids == answer([*TOKENS, 3], 2)
    assert world.workers["worker-0"].prefills == 1
    world.stop_doubles()


async def test_a_node_that_lost_its_memory_makes_contexts_unavailable(world):
    context = await world.context(TOKENS)
    world.nodes["node-1"].shards.clear()
    world.incarnations["node-1"] = 2
    await _becomes(world, context.context_id, pb.CONTEXT_STATE_UNAVAILABLE)
    replaced = await world.context(TOKENS)
    assert replaced.context_id == context.context_id
    assert replaced.state == pb.CONTEXT_STATE_READY
    assert world.workers["worker-0"].prefills == 2


async def test_a_snapshot_that_loads_late_makes_a_context_ready_again(world, monkeypatch):
    monkeypatch.setattr("coordinator.coordinator.TICK_S", 0.05)
    context = await world.context(TOKENS)
    node = world.nodes["node-1"]
    saved = dict(node.shards)
    node.shards.clear()
    world.incarnations["node-1"] = 2
    await _becomes(world, context.context_id, pb.CONTEXT_STATE_UNAVAILABLE)
    node.shards.update(saved)
    await _becomes(world, context.context_id, pb.CONTEXT_STATE_READY)


async def test_contexts_follow_a_node_to_its_new_address(tmp_path):
    world = new_world(data_dir=str(tmp_path))
    async with running_world(world):
        context = await world.context(TOKENS)
    world.nodes["node-0"].server.stop(0)
    world.nodes["node-0"].server = None
    async with running_world(world):
        await _becomes(world, context.context_id, pb.CONTEXT_STATE_READY)
        listed = await world.stub.ListContexts(pb.ListContextsRequest())
        addresses = {n.node_id: n.address for n in listed.contexts[0].shard_map.nodes}
        assert addresses == {name: node.address for name, node in world.nodes.items()}
    world.stop_doubles()


async def test_a_lost_catalog_is_rebuilt_from_the_nodes(tmp_path):
    world = new_world(data_dir=str(tmp_path))
    async with running_world(world):
        context = await world.context(TOKENS)
    shutil.rmtree(tmp_path)
    async with running_world(world):
        await _becomes(world, context.context_id, pb.CONTEXT_STATE_READY)
        listed = await world.stub.ListContexts(pb.ListContextsRequest())
        found = listed.contexts[0]
        assert found.tokens == context.tokens
        assert {s.shard_id: s for s in found.shard_map.shards} == {
            s.shard_id: s for s in context.shard_map.shards
        }
        assert (await world.create(TOKENS))[-1].found
        reply = await world.generate([3], context_id=context.context_id, max_tokens=2)
        assert reply.token_ids == answer([*TOKENS, 3], 2)
    world.stop_doubles()


async def test_a_deleted_context_does_not_come_back_with_a_node_that_was_away(tmp_path):
    world = new_world(data_dir=str(tmp_path))
    async with running_world(world):
        context = await world.context(TOKENS)
    world.silent.add("node-1")
    async with running_world(world):
        await world.stub.DeleteContext(pb.DeleteContextRequest(context_id=context.context_id))
        assert context.context_id in world.nodes["node-1"].shards
        world.silent.clear()
        await eventually(lambda: context.context_id not in world.nodes["node-1"].shards)
        gone = pb.GetContextRequest(context_id=context.context_id)
        assert isinstance(await raised(world.stub.GetContext(gone)), NotFound)
    world.stop_doubles()


async def test_shards_of_an_interrupted_prefill_are_dropped_from_a_node(world):
    context = await world.context(TOKENS)
    held = world.nodes["node-0"].shards[context.context_id]
    shard, identity, _ = next(iter(held.values()))
    world.nodes["node-0"].hold("ctx-half", shard, identity, sealed=False)
    world.incarnations["node-0"] = 2
    await eventually(lambda: "ctx-half" not in world.nodes["node-0"].shards)
    assert (await _states(world)) == {context.context_id: pb.CONTEXT_STATE_READY}


async def test_shards_of_another_model_are_left_alone(world):
    context = await world.context(TOKENS)
    held = world.nodes["node-0"].shards[context.context_id]
    shard, identity, _ = next(iter(held.values()))
    other = dataclasses.replace(identity, model="other")
    assert isinstance(other, Identity)
    world.nodes["node-0"].hold("ctx-other", shard, other, sealed=True)
    world.incarnations["node-0"] = 2
    await _becomes(world, context.context_id, pb.CONTEXT_STATE_READY)
    await asyncio.sleep(0.1)
    assert "ctx-other" in world.nodes["node-0"].shards
    assert set(await _states(world)) == {context.context_id}


async def test_draining_lets_running_generations_finish_and_admits_no_more():
    world = new_world()
    await world.start()
    worker = world.workers["worker-0"]
    worker.step_gate.clear()
    running = asyncio.create_task(world.generate([4], max_tokens=20))
    await eventually(lambda: worker.steps)
    draining = asyncio.create_task(world.server.coordinator.drain())
    await asyncio.sleep(0.05)
    refused = await raised(world.generate([5], max_tokens=1))
    assert isinstance(refused, Unavailable)
    assert refused.reason == "DRAINING"
    assert (await raised(world.create(TOKENS))).reason == "DRAINING"
    worker.step_gate.set()
    assert (await running).token_ids == answer([4], 20)
    await draining
    await world.stop()
    world.stop_doubles()


async def test_a_generation_that_outlasts_the_grace_is_cut_and_closed():
    world = new_world(drain_grace_s=0.1)
    await world.start()
    worker = world.workers["worker-0"]
    worker.step_gate.clear()
    running = asyncio.create_task(world.generate([4], max_tokens=20))
    await eventually(lambda: worker.steps)
    draining = asyncio.create_task(world.server.coordinator.drain())
    await asyncio.sleep(0.2)
    worker.step_gate.set()
    assert isinstance(await raised(running), Unavailable)
    await draining
    assert not worker.sessions
    await world.stop()
    world.stop_doubles()


async def test_sessions_that_a_crash_left_open_are_closed_and_those_of_others_are_not():
    world = new_world()
    worker = world.workers["worker-0"]
    own, other = "ses-coordinator-0-left", "ses-coordinator-1-running"
    for session_id in (own, other):
        worker.sessions[session_id] = FakeSession([], 0)
        world.nodes["node-0"].session_ids.append(session_id)
    async with running_world(world):
        await eventually(lambda: own not in worker.sessions)
        assert (await world.generate([4], max_tokens=5)).token_ids == answer([4], 5)
    assert set(worker.sessions) == {other}
    world.stop_doubles()


async def test_a_running_session_is_no_orphan(world):
    worker, node = world.workers["worker-0"], world.nodes["node-0"]
    worker.step_gate.clear()
    running = asyncio.create_task(world.generate([4], max_tokens=5))
    await eventually(lambda: worker.steps)
    node.session_ids.extend(worker.opened)
    world.incarnations["node-0"] = 2
    await world.beat()
    await asyncio.sleep(0.1)
    assert worker.closed == []
    worker.step_gate.set()
    assert (await running).token_ids == answer([4], 5)


async def test_sessions_left_open_on_nodes_are_closed_there_by_id():
    world = new_world()
    own, other = "ses-coordinator-0-left", "ses-coordinator-1-running"
    node = world.nodes["node-1"]
    node.session_ids.extend([own, other])
    async with running_world(world):
        await eventually(lambda: own not in node.session_ids)
        assert (await world.generate([4], max_tokens=5)).token_ids == answer([4], 5)
    assert node.session_ids == [other]
    world.stop_doubles()


async def test_the_nodes_of_a_killed_worker_s_sessions_are_told_to_close_them(world, monkeypatch):
    monkeypatch.setattr("coordinator.coordinator.TICK_S", 0.02)
    worker, node = world.workers["worker-0"], world.nodes["node-0"]
    worker.step_gate.clear()
    running = asyncio.create_task(world.generate([4], max_tokens=5))
    await eventually(lambda: worker.steps)
    node.session_ids.extend(worker.opened)
    worker.server.stop(None)
    assert isinstance(await raised(running), Unavailable)
    await eventually(lambda: not node.session_ids)
    worker.step_gate.set()


async def test_a_node_that_did_not_close_a_session_is_told_by_id(world, monkeypatch):
    monkeypatch.setattr("coordinator.coordinator.TICK_S", 0.02)
    worker, node = world.workers["worker-0"], world.nodes["node-0"]
    worker.closes_nodes = False
    worker.step_gate.clear()
    running = asyncio.create_task(world.generate([4], max_tokens=5))
    await eventually(lambda: worker.steps)
    node.session_ids.extend(worker.opened)
    worker.step_gate.set()
    assert (await running).token_ids == answer([4], 5)
    await eventually(lambda: not node.session_ids)


async def test_a_failed_index_is_part_of_the_context(world):
    world.nodes["node-1"].index_error = "layer 3: no memory"
    context = await world.context(TOKENS)
    shown = await world.stub.GetContext(pb.GetContextRequest(context_id=context.context_id))
    assert shown.context.index_error == "layer 3: no memory"
