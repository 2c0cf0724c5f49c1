"""Two coordinators at once over one catalog on a real Valkey server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

import pytest
from conftest import World, eventually, new_world, raised, running_world
from redis import Redis

from coordinator.catalog.base import ContextState
from coordinator.catalog.redis import RedisCatalog
from longreach.errors import Aborted, NotFound
from longreach.rpc.administration import rebuild_catalog
from longreach.v1 import generation_pb2 as pb

TOKENS = list(range(1, 200))


@pytest.fixture
def catalog_url(valkey_url):
    """A database of its own, empty."""
    url = valkey_url.rpartition("/")[0] + "/1"
    with contextlib.closing(Redis.from_url(url)) as redis:
        redis.flushdb()
    return url


@pytest.fixture
async def pair(catalog_url):
    """Two coordinators with the same workers and nodes; the first one leads."""
    one = new_world(catalog=catalog_url, coordinator_id="one")
    config = dataclasses.replace(one.config, coordinator_id="two")
    two = World(config, one.nodes, one.workers, incarnations=one.incarnations)
    async with running_world(one), running_world(two):
        yield one, two
    one.stop_doubles()


def settling(world):
    return world.server.coordinator.contexts.settling


async def state_of(world, context_id):
    try:
        reply = await world.stub.GetContext(pb.GetContextRequest(context_id=context_id))
    except Exception:
        return None
    return reply.context.state


async def test_a_context_made_through_one_is_usable_through_the_other_at_once(pair):
    one, two = pair
    context = await one.context(TOKENS)
    assert await state_of(two, context.context_id) == pb.CONTEXT_STATE_READY
    first = await one.generate([3], context_id=context.context_id, max_tokens=3)
    second = await two.generate([3], context_id=context.context_id, max_tokens=3)
    assert first.token_ids == second.token_ids
    assert (await two.create(TOKENS))[-1].found


async def test_a_context_last_heard_of_while_it_was_stored_is_usable_once_it_is(pair):
    one, two = pair
    worker = one.workers["worker-0"]
    worker.prefill_gate.clear()
    storing = asyncio.create_task(one.context(TOKENS))
    await eventually(lambda: worker.prefills)
    following = two.server.coordinator.contexts.following
    await following.follow()
    book = two.server.coordinator.contexts._book
    (context_id,) = book.records
    assert book.records[context_id].filling
    worker.prefill_gate.set()
    await storing
    assert (await two.generate([3], context_id=context_id, max_tokens=2)).token_ids


async def test_coordinators_that_store_the_same_at_once_prefill_once(pair):
    one, two = pair
    made = await asyncio.gather(one.context(TOKENS), two.context(TOKENS))
    assert made[0].context_id == made[1].context_id
    assert all(each.state == pb.CONTEXT_STATE_READY for each in made)
    assert one.workers["worker-0"].prefills == 1


async def test_who_asks_for_what_another_stores_waits_for_it(pair):
    one, two = pair
    worker = one.workers["worker-0"]
    worker.prefill_gate.clear()
    storing = asyncio.create_task(one.context(TOKENS))
    await eventually(lambda: worker.prefills)
    waiting = asyncio.create_task(two.create(TOKENS))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    # The leader asks a node meanwhile; what the other stores there is not nobody's.
    await settling(two).node_up("node-0")
    await settling(one).node_up("node-0")
    worker.prefill_gate.set()
    context = await storing
    assert (await waiting)[-1].context.context_id == context.context_id
    assert await state_of(two, context.context_id) == pb.CONTEXT_STATE_READY


async def test_the_leader_does_not_sweep_what_another_coordinator_stores(pair):
    one, two = pair
    worker = one.workers["worker-0"]
    worker.prefill_gate.clear()
    storing = asyncio.create_task(two.context(TOKENS))
    await eventually(lambda: worker.prefills)
    await settling(one).node_up("node-0")
    await settling(one).node_up("node-1")
    worker.prefill_gate.set()
    assert (await storing).state == pb.CONTEXT_STATE_READY


async def test_deleting_through_one_ends_what_the_other_does_with_it(pair):
    one, two = pair
    context = await one.context(TOKENS)
    await two.stub.DeleteContext(pb.DeleteContextRequest(context_id=context.context_id))
    following = one.server.coordinator.contexts.following
    await following.follow()
    assert isinstance(
        await raised(one.stub.GetContext(pb.GetContextRequest(context_id=context.context_id))),
        NotFound,
    )
    await eventually(lambda: not any(node.shards for node in one.nodes.values()))


async def test_deleting_elsewhere_what_is_being_stored_ends_its_creation(pair):
    one, two = pair
    worker = one.workers["worker-0"]
    worker.prefill_gate.clear()
    call = asyncio.create_task(one.create(TOKENS))
    await eventually(lambda: worker.prefills)
    await two.server.coordinator.contexts.following.follow()
    listed = await two.stub.ListContexts(pb.ListContextsRequest())
    gone = pb.DeleteContextRequest(context_id=listed.contexts[0].context_id)
    await two.stub.DeleteContext(gone)
    assert isinstance(await raised(call), Aborted)
    worker.prefill_gate.set()
    await eventually(lambda: not any(node.shards for node in one.nodes.values()))


async def test_what_a_dead_coordinator_was_storing_fails_and_can_be_stored_again(pair):
    one, two = pair
    context = await one.context(TOKENS)
    book = one.server.coordinator.contexts._book
    record = dataclasses.replace(
        book.records[context.context_id],
        context_id="ctx-lost",
        state=ContextState.FILLING,
        owner="three",
    )
    await book._catalog.put(record)
    await two.server.coordinator.contexts.following.follow()
    assert await state_of(two, "ctx-lost") == pb.CONTEXT_STATE_FILLING
    await one.server.coordinator.contexts.following.follow()
    await settling(one).settle()
    assert await state_of(one, "ctx-lost") == pb.CONTEXT_STATE_FAILED
    await two.server.coordinator.contexts.following.follow()
    assert await state_of(two, "ctx-lost") == pb.CONTEXT_STATE_FAILED


async def test_a_rebuild_restores_lost_records_and_names_silent_nodes(pair, catalog_url):
    one, two = pair
    context = await one.context(TOKENS, name="kept")
    await eventually(lambda: one.server.coordinator.contexts._book._nodes_written)
    catalog = one.server.coordinator._catalog
    assert isinstance(catalog, RedisCatalog)
    await catalog._redis.hdel(catalog._key["records"], context.context_id)
    await catalog._redis.zrem(catalog._key["revisions"], context.context_id)
    report = await asyncio.to_thread(rebuild_catalog, one.address)
    assert report.found == (context.context_id,)
    assert (report.contexts, report.answered, report.silent) == (1, ("node-0", "node-1"), ())
    assert (await catalog.get(context.context_id)).name == "kept"
    assert (await asyncio.to_thread(rebuild_catalog, two.address)).found == ()
    await catalog._redis.hset(catalog._key["nodes"], "node-9", "127.0.0.1:1")
    report = await asyncio.to_thread(rebuild_catalog, one.address)
    assert report.silent == ("node-9",)


async def test_a_coordinator_that_starts_on_an_empty_catalog_rebuilds_it(catalog_url):
    one = new_world(catalog=catalog_url)
    async with running_world(one):
        context = await one.context(TOKENS)
        before = await one.server.coordinator._catalog.get(context.context_id)
    with contextlib.closing(Redis.from_url(catalog_url)) as redis:
        redis.flushdb()
    async with running_world(one):
        catalog = one.server.coordinator._catalog
        found = []

        async def look():
            while not found:
                found.extend(await catalog.records())
                await asyncio.sleep(0.1)

        await asyncio.wait_for(look(), 20)
        rebuilt = found[0]
        assert {s.shard_id: s for s in rebuilt.shard_map.shards} == {
            s.shard_id: s for s in before.shard_map.shards
        }
        # What nodes do not know: when, by whom and under which name it was stored. These doubles
        # do not count bytes as real nodes do.
        unknown = ("name", "created_at", "prefill_s", "owner", "shard_map", "kv_bytes")
        same = {name: getattr(before, name) for name in unknown}
        assert dataclasses.replace(rebuilt, **same) == before
    one.stop_doubles()


async def test_writes_of_one_context_at_the_same_time_do_not_conflict_with_each_other(pair):
    one, _ = pair
    context = await one.context(TOKENS)
    book = one.server.coordinator.contexts._book
    record = book.records[context.context_id]
    versions = [dataclasses.replace(record, error=str(number)) for number in range(8)]
    await asyncio.gather(*(book.write(version) for version in versions))
    stored = await book._catalog.get(context.context_id)
    assert stored.error == "7"  # in the order of the calls
