"""Drops contexts from nodes, one drop of a context at a time.

A prefill that was cancelled may still have blocks on their way, so one drop is not enough then: the
node is asked afterwards and dropped again while it holds something. Whoever stores a context waits
for the drops of it that were begun before (`swept`), so that no drop hits the new copy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from coordinator.driver import Driver

ATTEMPTS = 10
PAUSE_S = 0.2
_log = logging.getLogger(__name__)


class Sweeper:
    """Background drops. Each is registered before the call that begins it returns."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._tasks: dict[str, asyncio.Task[int]] = {}

    def sweep(
        self,
        context_id: str,
        tenant: str,
        node_ids: Sequence[str],
        *,
        after: asyncio.Task[Any] | None = None,
        first: Callable[[], Awaitable[None]] | None = None,
        until_gone: bool = True,
    ) -> asyncio.Task[int]:
        """Begins to drop a context once `after` and earlier drops of it have ended and `first` is
        done. The task returns the bytes freed."""
        earlier = [task for task in (after, self._tasks.get(context_id)) if task is not None]

        async def run() -> int:
            if earlier:
                await asyncio.wait(earlier)
            if first is not None:
                await first()
            return await self._drop(context_id, tenant, node_ids, until_gone)

        task = asyncio.create_task(run())
        self._tasks[context_id] = task
        task.add_done_callback(lambda done: self._ended(context_id, done))
        return task

    async def swept(self, context_id: str) -> None:
        """Waits until no drop of a context is under way."""
        while task := self._tasks.get(context_id):
            await asyncio.wait([task])

    async def close(self) -> None:
        """Waits for every drop."""
        while self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    async def _drop(
        self, context_id: str, tenant: str, node_ids: Sequence[str], until_gone: bool
    ) -> int:
        freed = (await self._driver.drop(context_id, tenant, node_ids)).bytes_freed
        for _ in range(ATTEMPTS if until_gone else 0):
            await asyncio.sleep(PAUSE_S)
            held = await self._driver.inventories(node_ids, context_id)
            if not any(held.values()):
                return freed
            freed += (await self._driver.drop(context_id, tenant, node_ids)).bytes_freed
        if until_gone:
            _log.warning("nodes %s still hold parts of %s", ", ".join(node_ids), context_id)
        return freed

    def _ended(self, context_id: str, task: asyncio.Task[int]) -> None:
        if self._tasks.get(context_id) is task:
            del self._tasks[context_id]
        if not task.cancelled() and task.exception() is not None:
            _log.error("dropping context %s failed", context_id, exc_info=task.exception())
