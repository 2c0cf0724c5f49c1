"""Sessions that a crash of this coordinator left open on workers and nodes.

Session ids carry the name of the coordinator that made them. A restarted coordinator recognises
its own in the nodes' inventories and closes those that it does not know, so that they do not hold
a worker's slots. Sessions whose worker is gone as well end by the nodes' own timeout.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence

from coordinator.driver import Driver
from longreach.errors import LongreachError

_log = logging.getLogger(__name__)


class SessionNames:
    """Makes session ids and recognises its own."""

    def __init__(self, coordinator_id: str) -> None:
        self._prefix = f"ses-{coordinator_id}-"

    def new(self) -> str:
        """An id that no other session has."""
        return self._prefix + secrets.token_hex(12)

    def made(self, session_id: str) -> bool:
        """Whether this coordinator made the id, in this life or an earlier one."""
        return session_id.startswith(self._prefix)


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

    async def close(self, worker_ids: Sequence[str]) -> None:
        """Closes what was found, wherever it is; once every worker was asked, it is forgotten."""
        if not worker_ids:
            return
        found, self._found = self._found, set()
        asked = [
            self._close_on(worker_id, session_id)
            for session_id in found
            for worker_id in worker_ids
        ]
        closed = sum(await asyncio.gather(*asked))
        if closed:
            _log.info("closed %d sessions that an earlier life left open", closed)

    async def _close_on(self, worker_id: str, session_id: str) -> bool:
        try:
            return await self._driver.worker(worker_id).close_session(session_id, True)
        except LongreachError as error:
            _log.warning("session %s was not closed on %s: %s", session_id, worker_id, error)
            return False
