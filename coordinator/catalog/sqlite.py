"""The embedded catalog: one SQLite file, for a cluster with one coordinator."""

from __future__ import annotations

import asyncio
import math
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from coordinator.catalog.base import (
    TOMBSTONE_TTL_S,
    Beat,
    Catalog,
    Conflict,
    ContextRecord,
    Lease,
)
from coordinator.catalog.record_json import record_from_json, record_to_json
from longreach.errors import FailedPrecondition

T = TypeVar("T")

SCHEMA_VERSION = 2

_SCHEMA = """
CREATE TABLE IF NOT EXISTS contexts (
    context_id TEXT PRIMARY KEY,
    created_at REAL NOT NULL,
    record TEXT NOT NULL,
    token_ids BLOB,
    revision INTEGER NOT NULL DEFAULT 1
) STRICT;
CREATE TABLE IF NOT EXISTS removals (
    context_id TEXT PRIMARY KEY,
    removed_at REAL NOT NULL,
    revision INTEGER NOT NULL DEFAULT 1
) STRICT;
CREATE TABLE IF NOT EXISTS nodes (
    node_id TEXT PRIMARY KEY,
    address TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS numbers (
    name TEXT PRIMARY KEY,
    number INTEGER NOT NULL
) STRICT;
INSERT OR IGNORE INTO numbers VALUES ('revision', 1), ('epoch', 0);
"""
_FROM_1 = """
ALTER TABLE contexts ADD COLUMN revision INTEGER NOT NULL DEFAULT 1;
ALTER TABLE removals ADD COLUMN revision INTEGER NOT NULL DEFAULT 1;
"""


class SqliteCatalog(Catalog):
    """A catalog in `folder`/catalog.sqlite; an empty folder name keeps it in memory.

    Every write is one transaction, synced to disk before the call returns (write-ahead log with
    synchronous=FULL). SQLite blocks, so its calls run on threads, one at a time in their order.
    Its one coordinator leads for as long as it runs.
    """

    def __init__(self, folder: str = "", clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        path = ":memory:"
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            path = str(Path(folder) / "catalog.sqlite")
        self._turn = asyncio.Lock()
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._check_version(path)
        self._db.executescript(_SCHEMA)
        expired = clock() - TOMBSTONE_TTL_S
        with self._db:
            self._db.execute("DELETE FROM removals WHERE removed_at < ?", (expired,))
            self._db.execute("UPDATE numbers SET number = number + 1 WHERE name = 'epoch'")
        self._epoch = _number(self._db, "epoch")
        self._generation = secrets.token_hex(8)

    def _check_version(self, path: str) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise FailedPrecondition(
                f"{path} was written by a newer longreach (schema {version}; this one knows "
                f"{SCHEMA_VERSION}): upgrade, or start with another --data-dir; contexts are then "
                "found again from the nodes",
                reason="NEWER_CATALOG",
            )
        if version == 1:
            self._db.executescript(_FROM_1)
        self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    async def put(
        self,
        record: ContextRecord,
        token_ids: Sequence[int] | None = None,
        *,
        expected: int | None = None,
        epoch: int = 0,
    ) -> int:
        """Stores a record (see Catalog.put)."""
        ids = None if token_ids is None else np.asarray(token_ids, "<u4").tobytes()

        def write(db: sqlite3.Connection) -> int:
            self._check_epoch(epoch)
            row = db.execute(
                "SELECT revision FROM contexts WHERE context_id = ?", (record.context_id,)
            ).fetchone()
            stored = row[0] if row else 0
            if expected is not None and stored != expected:
                raise Conflict(
                    f"context {record.context_id} has revision {stored}, not {expected}: another "
                    "coordinator changed it; ask again"
                )
            revision = _next_revision(db)
            db.execute("DELETE FROM removals WHERE context_id = ?", (record.context_id,))
            db.execute(
                "INSERT INTO contexts VALUES (?, ?, ?, ?, ?) ON CONFLICT (context_id) DO UPDATE "
                "SET created_at = excluded.created_at, record = excluded.record, "
                "token_ids = coalesce(excluded.token_ids, token_ids), revision = excluded.revision",
                (record.context_id, record.created_at, record_to_json(record), ids, revision),
            )
            return revision

        return await self._run(write)

    async def get(self, context_id: str) -> ContextRecord | None:
        """The record, or None."""
        rows = await self._select("SELECT record FROM contexts WHERE context_id = ?", context_id)
        return record_from_json(rows[0][0]) if rows else None

    async def token_ids(self, context_id: str) -> tuple[int, ...] | None:
        """The context's tokens, or None."""
        rows = await self._select("SELECT token_ids FROM contexts WHERE context_id = ?", context_id)
        if not rows or rows[0][0] is None:
            return None
        return tuple(np.frombuffer(rows[0][0], "<u4").tolist())

    async def records(self) -> list[ContextRecord]:
        """Every record, newest first."""
        rows = await self._select("SELECT record FROM contexts ORDER BY created_at DESC")
        return [record_from_json(row[0]) for row in rows]

    async def remove(self, context_id: str) -> None:
        """Forgets a context and leaves a tombstone."""

        def write(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM contexts WHERE context_id = ?", (context_id,))
            db.execute(
                "INSERT OR REPLACE INTO removals VALUES (?, ?, ?)",
                (context_id, self._clock(), _next_revision(db)),
            )

        await self._run(write)

    async def tombstones(self) -> set[str]:
        """Ids that were removed and not stored again."""
        return {row[0] for row in await self._select("SELECT context_id FROM removals")}

    async def put_nodes(self, addresses: Mapping[str, str], *, epoch: int) -> None:
        """Replaces the known nodes."""

        def write(db: sqlite3.Connection) -> None:
            self._check_epoch(epoch)
            db.execute("DELETE FROM nodes")
            db.executemany("INSERT INTO nodes VALUES (?, ?)", list(addresses.items()))

        await self._run(write)

    async def nodes(self) -> dict[str, str]:
        """The nodes that the last leader knew."""
        return dict(await self._select("SELECT node_id, address FROM nodes"))

    async def beat(
        self, coordinator: str, since: int, known_epoch: int = 0, lease: Lease | None = None
    ) -> Beat:
        """What changed; the one coordinator is the leader, unless another was elected elsewhere."""

        def read(db: sqlite3.Connection) -> Beat:
            leading = lease or Lease(coordinator, self._epoch, math.inf)
            self._epoch = max(self._epoch, leading.epoch)
            records = db.execute(
                "SELECT record, revision FROM contexts WHERE revision > ?", (since,)
            ).fetchall()
            removed = db.execute(
                "SELECT context_id, revision FROM removals WHERE revision > ?", (since,)
            ).fetchall()
            return Beat(
                lease=leading.known_beside(self._epoch),
                present=frozenset({coordinator}),
                generation=self._generation,
                revision=_number(db, "revision"),
                records=tuple((record_from_json(text), number) for text, number in records),
                removed=tuple(removed),
            )

        return await self._run(read)

    async def close(self) -> None:
        """Closes the file, once no transaction is at work.

        One whose caller was cancelled goes on in its thread; SQLite crashes the process when its
        connection is closed meanwhile.
        """

        def close() -> None:
            with self._lock:
                self._db.close()

        await asyncio.to_thread(close)

    def _check_epoch(self, epoch: int) -> None:
        if epoch and epoch < self._epoch:
            raise Conflict(f"epoch {epoch} has passed; the leader's epoch is {self._epoch}")

    async def _select(self, query: str, *values: str) -> list[Any]:
        return await self._run(lambda db: db.execute(query, values).fetchall())

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def transaction() -> T:
            with self._lock, self._db:
                return work(self._db)

        async with self._turn:
            return await asyncio.to_thread(transaction)


def _number(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute("SELECT number FROM numbers WHERE name = ?", (name,)).fetchone()[0])


def _next_revision(db: sqlite3.Connection) -> int:
    db.execute("UPDATE numbers SET number = number + 1 WHERE name = 'revision'")
    return _number(db, "revision")
