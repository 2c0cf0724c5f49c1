"""The embedded catalog: one SQLite file, for a cluster with one coordinator."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from coordinator.catalog.base import Catalog, ContextRecord
from coordinator.catalog.record_json import record_from_json, record_to_json
from longreach.errors import FailedPrecondition

T = TypeVar("T")

SCHEMA_VERSION = 1
TOMBSTONE_TTL_S = 30 * 24 * 3600.0
"""How long a removal is remembered: longer than a node stays away and comes back."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS contexts (
    context_id TEXT PRIMARY KEY,
    created_at REAL NOT NULL,
    record TEXT NOT NULL,
    token_ids BLOB
) STRICT;
CREATE TABLE IF NOT EXISTS removals (
    context_id TEXT PRIMARY KEY,
    removed_at REAL NOT NULL
) STRICT;
"""


class SqliteCatalog(Catalog):
    """A catalog in `folder`/catalog.sqlite; an empty folder name keeps it in memory.

    Every write is one transaction, synced to disk before the call returns (write-ahead log with
    synchronous=FULL). SQLite blocks, so its calls run on threads, one at a time in their order.
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

    def _check_version(self, path: str) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise FailedPrecondition(
                f"{path} was written by a newer longreach (schema {version}; this one knows "
                f"{SCHEMA_VERSION}): upgrade, or start with another --data-dir; contexts are then "
                "found again from the nodes",
                reason="NEWER_CATALOG",
            )
        self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    async def put(self, record: ContextRecord, token_ids: Sequence[int] | None = None) -> None:
        """Stores a record (see Catalog.put)."""
        ids = None if token_ids is None else np.asarray(token_ids, "<u4").tobytes()

        def write(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM removals WHERE context_id = ?", (record.context_id,))
            db.execute(
                "INSERT INTO contexts VALUES (?, ?, ?, ?) ON CONFLICT (context_id) DO UPDATE SET "
                "created_at = excluded.created_at, record = excluded.record, "
                "token_ids = coalesce(excluded.token_ids, token_ids)",
                (record.context_id, record.created_at, record_to_json(record), ids),
            )

        await self._run(write)

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
            db.execute("INSERT OR REPLACE INTO removals VALUES (?, ?)", (context_id, self._clock()))

        await self._run(write)

    async def tombstones(self) -> set[str]:
        """Ids that were removed and not stored again."""
        return {row[0] for row in await self._select("SELECT context_id FROM removals")}

    async def close(self) -> None:
        """Closes the file."""
        await asyncio.to_thread(self._db.close)

    async def _select(self, query: str, *values: str) -> list[Any]:
        return await self._run(lambda db: db.execute(query, values).fetchall())

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def transaction() -> T:
            with self._lock, self._db:
                return work(self._db)

        async with self._turn:
            return await asyncio.to_thread(transaction)
