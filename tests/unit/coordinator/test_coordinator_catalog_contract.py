"""What every catalog promises, over SQLite and over a real Valkey server."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools

import pytest

from coordinator.catalog.base import Conflict, ContextRecord, ContextState, Lease
from coordinator.catalog.redis import LEASE_TTL_S, RedisCatalog
from coordinator.catalog.sqlite import SqliteCatalog
from longreach.errors import InvalidRequest, Unavailable
from longreach.types import Identity, Shard, ShardMap, Span

DAY_S = 24 * 3600.0
RECORD = ContextRecord(
    context_id="ctx-1",
    name='a "näme"',
    identity=Identity("m", "r", "bfloat16", tenant="t"),
    state=ContextState.READY,
    tokens=4,
    kv_bytes=1 << 40,
    created_at=1700000000.25,
    shard_map=ShardMap(
        (Shard("s0", Span(0, 4), (0, 2), 0, 2, ("n1", "n2")),), {"n1": "a:1"}, "layer", "why"
    ),
    owner="coordinator-1",
)
_namespaces = itertools.count()


@pytest.fixture(params=["sqlite", "redis"])
async def catalog(request, tmp_path):
    if request.param == "sqlite":
        opened = SqliteCatalog(str(tmp_path))
    else:
        url = request.getfixturevalue("valkey_url")
        opened = RedisCatalog(url, f"contract-{next(_namespaces)}")
    yield opened
    await opened.close()


async def test_what_was_put_is_got(catalog):
    assert await catalog.get("ctx-1") is None
    assert await catalog.token_ids("ctx-1") is None
    await catalog.put(RECORD, [5, 0, 4294967295])
    later = dataclasses.replace(RECORD, state=ContextState.UNAVAILABLE)
    await catalog.put(later)
    assert await catalog.get("ctx-1") == later
    assert await catalog.token_ids("ctx-1") == (5, 0, 4294967295)
    assert await catalog.records() == [later]


async def test_a_context_of_no_tokens_is_not_one_whose_tokens_are_unknown(catalog):
    await catalog.put(RECORD)
    assert await catalog.token_ids("ctx-1") is None
    await catalog.put(RECORD, [])
    assert await catalog.token_ids("ctx-1") == ()


async def test_records_come_newest_first(catalog):
    for i in (2, 3, 1):
        await catalog.put(dataclasses.replace(RECORD, context_id=f"ctx-{i}", created_at=float(i)))
    assert [each.context_id for each in await catalog.records()] == ["ctx-3", "ctx-2", "ctx-1"]


async def test_revisions_grow_with_every_change(catalog):
    first = await catalog.put(RECORD)
    other = await catalog.put(dataclasses.replace(RECORD, context_id="ctx-2"))
    second = await catalog.put(RECORD)
    assert first < other < second


async def test_a_write_that_expects_another_revision_changes_nothing(catalog):
    first = await catalog.put(RECORD, [1], expected=0)
    second = await catalog.put(dataclasses.replace(RECORD, name="b"), expected=first)
    for stale in (0, first, second + 1):
        with pytest.raises(Conflict, match=f"has revision {second}, not {stale}"):
            await catalog.put(dataclasses.replace(RECORD, name="c"), [2], expected=stale)
    assert (await catalog.get("ctx-1")).name == "b"
    assert await catalog.token_ids("ctx-1") == (1,)


async def test_of_many_that_reserve_at_once_one_wins(catalog):
    async def reserve(number):
        record = dataclasses.replace(RECORD, owner=f"coordinator-{number}")
        try:
            return await catalog.put(record, [number], expected=0) and number
        except Conflict:
            return None

    winners = [n for n in await asyncio.gather(*map(reserve, range(1, 9))) if n is not None]
    assert len(winners) == 1
    assert (await catalog.get("ctx-1")).owner == f"coordinator-{winners[0]}"
    assert await catalog.token_ids("ctx-1") == (winners[0],)


async def test_removal_leaves_a_tombstone_until_the_context_is_stored_again(catalog):
    await catalog.put(RECORD, [1])
    await catalog.remove("ctx-1")
    assert await catalog.records() == []
    assert await catalog.tombstones() == {"ctx-1"}
    await catalog.put(RECORD, expected=0)
    assert await catalog.tombstones() == set()
    assert await catalog.token_ids("ctx-1") is None


async def test_tombstones_expire_after_a_month(tmp_path, valkey_url):
    now = 1_700_000_000.0
    for open_at in (
        lambda clock: SqliteCatalog(str(tmp_path), clock=clock),
        lambda clock: RedisCatalog(valkey_url, "tombstones", clock=clock),
    ):
        for days, left in ((0, {"ctx-old"}), (29, {"ctx-old"}), (31, set()), (29, set())):
            catalog = open_at(lambda days=days: now + days * DAY_S)
            if days == 0:
                await catalog.remove("ctx-old")
            assert await catalog.tombstones() == left
            await catalog.close()


async def test_a_beat_tells_what_changed_since_a_revision(catalog):
    start = await catalog.beat("a", 0)
    assert (start.records, start.removed) == ((), ())
    first = await catalog.put(RECORD)
    second = await catalog.put(dataclasses.replace(RECORD, context_id="ctx-2"))
    both = await catalog.beat("a", start.revision)
    assert sorted(each.context_id for each, _ in both.records) == ["ctx-1", "ctx-2"]
    assert {number for _, number in both.records} == {first, second}
    assert both.revision == second
    await catalog.remove("ctx-1")
    last = await catalog.beat("a", both.revision)
    assert (last.records, last.removed) == ((), (("ctx-1", last.revision),))
    quiet = await catalog.beat("a", last.revision)
    assert (quiet.records, quiet.removed, quiet.revision) == ((), (), last.revision)
    assert quiet.generation == start.generation


async def test_a_reporter_is_present_and_a_lone_one_leads_on(catalog):
    beats = [await catalog.beat("a", 0) for _ in range(3)]
    assert all(beat.present == {"a"} for beat in beats)
    assert {(beat.lease.holder, beat.lease.epoch) for beat in beats} == {("a", 1)}


async def test_an_older_leaders_writes_are_refused(catalog):
    epoch = (await catalog.beat("a", 0)).lease.epoch
    await catalog.put(RECORD, epoch=epoch)
    await catalog.put_nodes({"n1": "h:1", "n2": "h:2"}, epoch=epoch)
    assert await catalog.nodes() == {"n1": "h:1", "n2": "h:2"}
    await catalog.put_nodes({"n2": "h:3"}, epoch=epoch)
    assert await catalog.nodes() == {"n2": "h:3"}
    if isinstance(catalog, SqliteCatalog):
        return  # The next leader is the next process: see below.
    newer = (await catalog.beat("a", 0, known_epoch=epoch + 5)).lease.epoch
    assert newer == epoch + 6
    with pytest.raises(Conflict, match=f"epoch {epoch} has passed"):
        await catalog.put(dataclasses.replace(RECORD, name="late"), epoch=epoch)
    with pytest.raises(Conflict, match="has passed"):
        await catalog.put_nodes({}, epoch=epoch)
    assert (await catalog.get("ctx-1")).name == RECORD.name
    assert await catalog.nodes() == {"n2": "h:3"}


async def test_a_leader_that_was_elected_elsewhere_leads_under_its_epoch(catalog):
    own = (await catalog.beat("a", 0)).lease.epoch
    elsewhere = Lease("b", own + 3, 7.5)
    assert (await catalog.beat("a", 0, lease=elsewhere)).lease == elsewhere
    await catalog.put_nodes({"n1": "h:1"}, epoch=own + 3)
    with pytest.raises(Conflict, match="has passed"):
        await catalog.put_nodes({}, epoch=own)
    late = await catalog.beat("a", 0, lease=Lease("a", own + 2, 7.5))
    assert late.lease == Lease("a", own + 3, 0.0), "an epoch that has passed gets no time"
    assert (await catalog.beat("a", 0, lease=Lease("", own + 3, 0.0))).lease.holder == ""


async def test_the_embedded_catalogs_epoch_grows_with_every_start(tmp_path):
    epochs = []
    for _ in range(2):
        catalog = SqliteCatalog(str(tmp_path))
        epochs.append((await catalog.beat("a", 0)).lease.epoch)
        await catalog.close()
    assert epochs[0] < epochs[1]


async def test_two_coordinators_of_one_redis_have_one_leader_and_see_each_other(valkey_url):
    one, two = (RedisCatalog(valkey_url, "two") for _ in range(2))
    led = await one.beat("a", 0)
    followed = await two.beat("b", 0)
    assert led.lease.holder == followed.lease.holder == "a"
    assert led.lease.epoch == followed.lease.epoch
    assert followed.present == {"a", "b"}
    await one.put(RECORD, [1, 2])
    heard = await two.beat("b", followed.revision)
    assert [each for each, _ in heard.records] == [RECORD]
    assert await two.token_ids("ctx-1") == (1, 2)
    await one.close()
    await two.close()


async def test_the_lease_of_a_silent_leader_passes_on_under_a_higher_epoch(valkey_url):
    catalog = RedisCatalog(valkey_url, "silent")
    first = await catalog.beat("a", 0)
    # What the server does by itself LEASE_TTL_S after the last report.
    assert 0 < await catalog._redis.pttl(catalog._key["leader"]) <= LEASE_TTL_S * 1000
    await catalog._redis.delete(catalog._key["leader"])
    taken = await catalog.beat("b", 0)
    assert (taken.lease.holder, taken.lease.epoch) == ("b", first.lease.epoch + 1)
    assert (await catalog.beat("a", 0)).lease.holder == "b"
    await catalog.close()


async def test_lost_data_is_told_by_another_generation_and_epochs_go_on(valkey_url):
    catalog = RedisCatalog(valkey_url, "lost")
    before = await catalog.beat("a", 0)
    await catalog.put(RECORD)
    await catalog._redis.delete(*catalog._keys)
    after = await catalog.beat("a", before.revision, known_epoch=before.lease.epoch)
    assert after.generation != before.generation
    assert after.lease.epoch > before.lease.epoch
    assert (await catalog.beat("a", 0)).records == ()
    await catalog.close()


async def test_namespaces_keep_clusters_apart(valkey_url):
    one, two = (RedisCatalog(valkey_url, name) for name in ("here", "there"))
    await one.put(RECORD)
    assert await two.records() == []
    assert (await two.beat("b", 0)).lease.holder == "b"
    await one.close()
    await two.close()


async def test_redis_away_is_unavailable_with_a_time_to_try_again():
    catalog = RedisCatalog("redis://:secret@127.0.0.1:1/0", "away")
    for call in (
        catalog.put(RECORD),
        catalog.get("ctx-1"),
        catalog.records(),
        catalog.beat("a", 0),
        catalog.remove("ctx-1"),
        catalog.tombstones(),
        catalog.nodes(),
    ):
        with pytest.raises(Unavailable, match=r"redis://127\.0\.0\.1:1 does not answer") as caught:
            await call
        assert caught.value.reason == "CATALOG_UNAVAILABLE"
        assert caught.value.retry_after_s
        assert "secret" not in caught.value.message
    await catalog.close()


def test_a_url_that_is_none_is_refused():
    with pytest.raises(InvalidRequest, match="redis://HOST:PORT/DB"):
        RedisCatalog("http://127.0.0.1:1", "x")
