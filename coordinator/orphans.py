"""Sessions left open on workers and nodes: by a crash of a coordinator, of a worker, or by a move.

Nodes say which coordinator drives each of their sessions. A restarted coordinator recognises its
own and closes those that it does not know, once their clients had time to go on elsewhere. A
session whose worker is gone cannot be closed through it; its nodes are told directly, by id. All of
it names the epoch, so that nothing is closed that somebody took over since.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator.driver import Driver
from longreach.errors import LongreachError, Unavailable
from longreach.types import SessionInventory

RESUME_GRACE_S = 3.0
"""How long a client may take to go on at another coordinator before its session is closed."""
KEEP_S = 120.0
"""How long a member that was away when a session ended is told of it when it is back; later its own
timeout has freed the session."""
_log = logging.getLogger(__name__)


class SessionNames:
    """Makes session ids and recognises this coordinator's sessions."""

    def __init__(self, coordinator_id: str, secret: bytes) -> None:
        self.coordinator_id = coordinator_id
        self._secret = secret

    def new(self, key: str = "") -> str:
        """An id that no other session has; with a client's key the same on every coordinator."""
        if not key:
            return f"ses-{self.coordinator_id}-{secrets.token_hex(12)}"
        return f"ses-{hmac.new(self._secret, key.encode(), hashlib.sha256).hexdigest()[:24]}"

    def drives(self, session: SessionInventory) -> bool:
        """Whether this coordinator drives a session, in this life or an earlier one."""
        return session.coordinator_id == self.coordinator_id


@dataclass(slots=True)
class _Left:
    """A session to close wherever it is, from `due` on; `told` are the members that know."""

    epoch: int
    due: float
    told: set[str] = field(default_factory=set)


class Orphans:
    """Finds and closes sessions that nobody drives. `lives` says whether a session is driven."""

    def __init__(
        self,
        names: SessionNames,
        driver: Driver,
        lives: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._names = names
        self._driver = driver
        self._lives = lives
        self._clock = clock
        self._left: dict[str, _Left] = {}
        self._behind: dict[tuple[str, str], int] = {}

    def report(self, sessions: Iterable[SessionInventory]) -> None:
        """Takes the sessions that a node has open."""
        due = self._clock() + RESUME_GRACE_S
        for each in sessions:
            if self._names.drives(each) and not self._lives(each.session_id):
                self._left.setdefault(each.session_id, _Left(each.epoch, due))

    def left(self, session_id: str, epoch: int) -> None:
        """Takes a session that has ended, up to that epoch, and may be open somewhere still."""
        self._left[session_id] = _Left(epoch, self._clock())

    def behind(self, worker_id: str, session_id: str, epoch: int) -> None:
        """Takes a session that goes on under a newer epoch and has left this worker."""
        self._behind[worker_id, session_id] = epoch

    async def close(self, worker_ids: Sequence[str], node_ids: Sequence[str]) -> None:
        """Closes what was found, wherever it is; members that are away are told later."""
        now = self._clock()
        closing = []
        for (worker_id, session_id), epoch in list(self._behind.items()):
            if worker_id in worker_ids:
                del self._behind[worker_id, session_id]
                closing.append(self._on_worker(worker_id, session_id, epoch, on_nodes=False))
        for session_id, left in list(self._left.items()):
            if now - left.due > KEEP_S:
                del self._left[session_id]
            elif now >= left.due:
                closing += [
                    self._on_worker(name, session_id, left.epoch, on_nodes=True, told=left.told)
                    for name in worker_ids
                    if name not in left.told
                ]
                closing += [
                    self._on_node(name, session_id, left)
                    for name in node_ids
                    if name not in left.told
                ]
        closed = sum(await asyncio.gather(*closing))
        if closed:
            _log.info("closed sessions left open in %d places", closed)

    async def _on_worker(
        self,
        worker_id: str,
        session_id: str,
        epoch: int,
        *,
        on_nodes: bool,
        told: set[str] | None = None,
    ) -> bool:
        told = set() if told is None else told
        told.add(worker_id)
        worker = self._driver.worker(worker_id)
        answer = await _closing(
            f"{session_id} on {worker_id}", worker.close_session(session_id, on_nodes, epoch)
        )
        if answer is None:
            told.discard(worker_id)
            if not on_nodes:
                self._behind.setdefault((worker_id, session_id), epoch)
        return bool(answer)

    async def _on_node(self, node_id: str, session_id: str, left: _Left) -> bool:
        left.told.add(node_id)
        answer = await _closing(
            f"{session_id} on {node_id}",
            self._driver.close_on_node(node_id, session_id, left.epoch),
        )
        if answer is None:
            left.told.discard(node_id)
        return bool(answer)


async def _closing(what: str, closing: Coroutine[Any, Any, int]) -> int | None:
    try:
        return await closing
    except LongreachError as error:
        level = logging.DEBUG if isinstance(error, Unavailable) else logging.WARNING
        _log.log(level, "session %s was not closed: %s", what, error)
        return None
