"""Drops what is left of a context on nodes, in the background, until it is really gone.

A prefill that was cancelled may still have blocks on their way, so one drop is not enough: the
node is asked afterwards and dropped again while it holds something.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from coordinator.driver import Driver
from longreach.errors import LongreachError

ATTEMPTS = 10
PAUSE_S = 0.2
_log = logging.getLogger(__name__)


class Sweeper:
    """One background task per context at a time; a later sweep waits for the earlier one."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def sweep(
        self,
        context_id: str,
        tenant: str,
        node_ids: Sequence[str],
        *,
        after: asyncio.Task[None] | None = None,
        then: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Begins to drop a context on nodes, once `after` has ended; calls `then` first."""
        earlier = [task for task in (after, self._tasks.get(context_id)) if task is not None]
        task = asyncio.create_task(self._sweep(context_id, tenant, node_ids, earlier, then))
        self._tasks[context_id] = task
        task.add_done_callback(lambda done: self._ended(context_id, done))

    async def swept(self, context_id: str) -> None:
        """Waits until no sweep of a context runs."""
        task = self._tasks.get(context_id)
        if task is not None:
            await asyncio.wait([task])

    async def close(self) -> None:
        """Waits for every sweep."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    async def _sweep(
        self,
        context_id: str,
        tenant: str,
        node_ids: Sequence[str],
        earlier: list[asyncio.Task[None]],
        then: Callable[[], Awaitable[None]] | None,
    ) -> None:
        if earlier:
            await asyncio.wait(earlier)
        if then is not None:
            await then()
        for _ in range(ATTEMPTS):
            await self._driver.drop(context_id, tenant, node_ids)
            await asyncio.sleep(PAUSE_S)
            held = await self._driver.inventories(node_ids, context_id)
            if not any(held.values()):
                return
        _log.warning("nodes %s still hold parts of context %s", ", ".join(node_ids), context_id)

    def _ended(self, context_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(context_id) is task:
            del self._tasks[context_id]
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, LongreachError):
            _log.error("dropping context %s failed", context_id, exc_info=error)
