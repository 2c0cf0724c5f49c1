"""Sessions left open on workers and nodes: by a crash of this coordinator, or of a worker.

Session ids carry the name of the coordinator that made them. A restarted coordinator recognises
its own in the nodes' inventories and closes those that it does not know, so that they do not hold
a worker's slots. A session whose worker is gone cannot be closed through it; its nodes are told
directly, by id, so that its tail does not take their memory until it times out.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from coordinator.driver import Driver
from longreach.errors import LongreachError

_log = logging.getLogger(__name__)


class SessionNames:
    """Makes session ids and recognises its own."""

    def __init__(self, coordinator_id: str) -> None:
        self._prefix = f"ses-{coordinator_id}"

    def new(self) -> str:
        """An id that no other session has."""
        return f"{self._prefix}-{secrets.token_hex(12)}"

    def made(self, session_id: str) -> bool:
        """Whether this coordinator made the id, in this life or an earlier one."""
        # Not startswith: another coordinator's name may begin as this one's does.
        return session_id.rpartition("-")[0] == self._prefix


class Orphans:
    """Finds and closes sessions that nobody drives. `lives` says whether a session is driven."""

    def __init__(self, names: SessionNames, driver: Driver, lives: Callable[[str], bool]) -> None:
        self._names = names
        self._driver = driver
        self._lives = lives
        self._found: set[str] = set()

    def report(self, session_ids: Iterable[str]) -> None:
        """Takes the sessions that a node has open."""
        self._found.update(
            each for each in session_ids if self._names.made(each) and not self._lives(each)
        )

    def left(self, session_id: str) -> None:
        """Takes a session that has ended and that its worker did not close."""
        self._found.add(session_id)

    async def close(self, worker_ids: Sequence[str], node_ids: Sequence[str]) -> None:
        """Closes what was found, wherever it is; once workers were asked, it is forgotten."""
        found = sorted(self._found)
        if worker_ids:
            self._found.clear()
        on_workers = [
            _closing(f"{session_id} on {worker_id}", self._on_worker(worker_id, session_id))
            for session_id in found
            for worker_id in worker_ids
        ]
        on_nodes = [
            _closing(f"{session_id} on {node_id}", self._on_node(node_id, session_id))
            for session_id in found
            for node_id in node_ids
        ]
        closed = sum(await asyncio.gather(*on_workers))
        freed = sum(await asyncio.gather(*on_nodes))
        if closed or freed:
            _log.info("closed %d sessions left open and freed %d bytes of tails", closed, freed)

    async def _on_worker(self, worker_id: str, session_id: str) -> int:
        return int(await self._driver.worker(worker_id).close_session(session_id, True))

    async def _on_node(self, node_id: str, session_id: str) -> int:
        return await self._driver.close_on_node(node_id, session_id)


async def _closing(what: str, closing: Coroutine[Any, Any, int]) -> int:
    try:
        return await closing
    except LongreachError as error:
        _log.warning("session %s was not closed: %s", what, error)
        return 0
