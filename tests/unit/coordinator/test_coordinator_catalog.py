"""The embedded catalog, over a real SQLite file."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading

import pytest

from coordinator.catalog.base import TOMBSTONE_TTL_S, ContextRecord, ContextState
from coordinator.catalog.record_json import record_from_json, record_to_json
from coordinator.catalog.sqlite import SqliteCatalog
from longreach.errors import FailedPrecondition
from longreach.types import Identity, Shard, ShardMap, Span

RECORD = ContextRecord(
    context_id="ctx-1",
    name='a "name"',
    identity=Identity("m", "r", "bfloat16", tenant="t"),
    state=ContextState.READY,
    tokens=4,
    kv_bytes=1 << 40,
    created_at=1700000000.25,
    shard_map=ShardMap(
        (
            Shard("s0", Span(0, 4), (0, 2), 0, 2, ("n1", "n2")),
            Shard("s1", Span(0, 4), (1,), 0, 2, ("n2",)),
        ),
        {"n1": "a:1", "n2": "b:2"},
        "layer",
        "because",
    ),
    prefill_fraction=1.0,
    prefill_s=2.5,
)


def test_a_record_survives_json():
    assert record_from_json(record_to_json(RECORD)) == RECORD


async def test_what_was_put_is_there_after_reopening(tmp_path):
    catalog = SqliteCatalog(str(tmp_path))
    await catalog.put(RECORD, [5, 0, 4294967295])
    await catalog.put(dataclasses.replace(RECORD, state=ContextState.UNAVAILABLE))
    await catalog.close()
    again = SqliteCatalog(str(tmp_path))
    found = await again.get("ctx-1")
    assert found == dataclasses.replace(RECORD, state=ContextState.UNAVAILABLE)
    assert await again.token_ids("ctx-1") == (5, 0, 4294967295)
    await again.close()


async def test_unknown_contexts_are_none():
    catalog = SqliteCatalog()
    assert await catalog.get("ctx-none") is None
    assert await catalog.token_ids("ctx-none") is None
    await catalog.put(RECORD)
    assert await catalog.token_ids("ctx-1") is None
    await catalog.close()


async def test_records_come_newest_first():
    catalog = SqliteCatalog()
    for i in (2, 3, 1):
        await catalog.put(dataclasses.replace(RECORD, context_id=f"ctx-{i}", created_at=float(i)))
    assert [record.context_id for record in await catalog.records()] == ["ctx-3", "ctx-2", "ctx-1"]
    await catalog.close()


async def test_removal_leaves_a_tombstone_until_the_context_is_stored_again(tmp_path):
    catalog = SqliteCatalog(str(tmp_path))
    await catalog.put(RECORD, [1])
    await catalog.remove("ctx-1")
    await catalog.close()
    again = SqliteCatalog(str(tmp_path))
    assert await again.records() == []
    assert await again.tombstones() == {"ctx-1"}
    await again.put(RECORD)
    assert await again.tombstones() == set()
    assert await again.token_ids("ctx-1") is None
    await again.close()


def test_a_catalog_of_a_newer_version_is_refused_untouched(tmp_path):
    SqliteCatalog(str(tmp_path))
    path = tmp_path / "catalog.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(FailedPrecondition, match="schema 99"):
        SqliteCatalog(str(tmp_path))
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (99,)


async def test_tombstones_expire_after_a_month(tmp_path):
    day = 24 * 3600.0
    now = 1_700_000_000.0
    catalog = SqliteCatalog(str(tmp_path), clock=lambda: now)
    await catalog.remove("ctx-old")
    await catalog.close()
    assert 30 * day <= TOMBSTONE_TTL_S
    for days, left in ((29, {"ctx-old"}), (31, set())):
        later = SqliteCatalog(str(tmp_path), clock=lambda days=days: now + days * day)
        assert await later.tombstones() == left
        await later.close()


def test_a_finished_put_survives_the_death_of_the_process(tmp_path):
    script = textwrap.dedent(
        """
        import asyncio, dataclasses, os, signal, sys
        from coordinator.catalog.record_json import record_from_json
        from coordinator.catalog.sqlite import SqliteCatalog

        async def main():
            catalog = SqliteCatalog(sys.argv[1])
            record = record_from_json(sys.argv[2])
            for i in range(50):
                await catalog.put(dataclasses.replace(record, context_id=f"ctx-{i}"), range(i))
                print(i, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main())
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), record_to_json(RECORD)],
        env=dict(os.environ, PYTHONPATH=os.getcwd()),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    acknowledged = len(done.stdout.split())
    assert acknowledged == 50

    import asyncio

    async def read():
        catalog = SqliteCatalog(str(tmp_path))
        found = {record.context_id for record in await catalog.records()}
        ids = await catalog.token_ids("ctx-49")
        await catalog.close()
        return found, ids

    found, ids = asyncio.run(read())
    assert found == {f"ctx-{i}" for i in range(50)}
    assert ids == tuple(range(49))


async def test_a_broken_write_changes_nothing():
    catalog = SqliteCatalog()
    await catalog.put(RECORD, [1, 2])
    with pytest.raises(OverflowError):
        await catalog.put(dataclasses.replace(RECORD, name="new"), [-1])
    assert (await catalog.get("ctx-1")).name == RECORD.name
    await catalog.close()


async def test_closing_waits_for_a_transaction_whose_caller_was_cancelled(tmp_path):
    catalog = SqliteCatalog(str(tmp_path))
    await catalog.put(RECORD)
    began, go_on, read = threading.Event(), threading.Event(), []

    def slow(db: sqlite3.Connection) -> None:
        began.set()
        go_on.wait(30)
        read.extend(db.execute("SELECT context_id FROM contexts").fetchall())

    asking = asyncio.create_task(catalog._run(slow))
    assert await asyncio.to_thread(began.wait, 30)
    asking.cancel()
    await asyncio.wait([asking])
    closing = asyncio.create_task(catalog.close())
    # What `slow` holds is free once it is done: only then may the connection go.
    assert catalog._lock.locked()
    go_on.set()
    await closing
    assert read == [("ctx-1",)]


async def test_a_file_of_the_first_schema_is_taken_over(tmp_path):
    with sqlite3.connect(tmp_path / "catalog.sqlite") as db:
        db.executescript(
            """
            CREATE TABLE contexts (context_id TEXT PRIMARY KEY, created_at REAL NOT NULL,
                                   record TEXT NOT NULL, token_ids BLOB) STRICT;
            CREATE TABLE removals (context_id TEXT PRIMARY KEY, removed_at REAL NOT NULL) STRICT;
            PRAGMA user_version = 1;
            """
        )
        row = (RECORD.context_id, RECORD.created_at, record_to_json(RECORD), b"\1\0\0\0")
        db.execute("INSERT INTO contexts VALUES (?, ?, ?, ?)", row)
        db.execute("INSERT INTO removals VALUES ('ctx-gone', 4e9)")
    for _ in range(2):
        catalog = SqliteCatalog(str(tmp_path))
        assert await catalog.records() == [RECORD]
        assert await catalog.token_ids("ctx-1") == (1,)
        assert await catalog.tombstones() == {"ctx-gone"}
        beat = await catalog.beat("a", 0)
        assert await catalog.put(RECORD, expected=dict_of(beat)["ctx-1"]) > 1
        await catalog.close()


def dict_of(beat):
    return {record.context_id: revision for record, revision in beat.records}
