"""Keeps contexts in step with the nodes: what is sealed where decides what is READY.

Nodes are asked for their inventory when they register, come back or move, and again while
something that they should hold is out of reach. Contexts that only the nodes remember are rebuilt;
what a node holds for nobody is dropped there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from coordinator import holdings
from coordinator.catalog.base import Conflict, ContextRecord, ContextState
from coordinator.cluster import Cluster
from coordinator.context_book import ContextBook
from coordinator.driver import Driver
from coordinator.filling import Filling
from coordinator.models import Models
from coordinator.sweeper import Sweeper
from longreach.types import SessionInventory, ShardInventory

# Members report every second; in this time after the start all that live have registered.
PATIENCE_S = 4.0
ASK_ATTEMPTS = 4
ASK_PAUSE_S = 0.3
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild did: contexts found, how many there are now, nodes that answered or not."""

    found: tuple[str, ...]
    contexts: int
    answered: tuple[str, ...]
    silent: tuple[str, ...]


class Settling:
    """Reacts to membership for every context that is not being stored.

    `on_sessions` is told which sessions a node has open; `catch_up` takes what other coordinators
    did and says whether it could; contexts found on nodes want `replicas` copies at least. Every
    coordinator decides states for itself; the leader alone writes them, rebuilds and sweeps.
    """

    def __init__(
        self,
        book: ContextBook,
        cluster: Cluster,
        driver: Driver,
        models: Models,
        held: holdings.Holdings,
        filling: Filling,
        sweeper: Sweeper,
        on_sessions: Callable[[list[SessionInventory]], None],
        catch_up: Callable[[], Awaitable[bool]],
        replicas: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._book = book
        self._cluster = cluster
        self._driver = driver
        self._models = models
        self._holdings = held
        self._filling = filling
        self._sweeper = sweeper
        self._on_sessions = on_sessions
        self._catch_up = catch_up
        self._replicas = replicas
        self._clock = clock
        self._patient_until = clock() + PATIENCE_S
        self._changed = asyncio.Event()

    async def given_time(self, context_id: str) -> None:
        """Waits for the nodes of a context that is out of reach only because this coordinator has
        just started and its nodes have not all registered yet."""
        while self._clock() < self._patient_until:
            record = self._book.records.get(context_id)
            if record is None or record.state is not ContextState.UNAVAILABLE:
                return
            if all(self._holdings.heard(node_id) for node_id in record.node_ids):
                return
            try:
                async with asyncio.timeout(self._patient_until - self._clock()):
                    await self._changed.wait()
            except TimeoutError:
                return

    async def node_up(self, node_id: str) -> None:
        """A node registered, or came back: takes its inventory and settles every context."""
        answer = await self._ask(node_id)
        if answer is None:
            return
        inventory, sessions = answer
        self._on_sessions(sessions)
        self._holdings.report(node_id, inventory)
        if await self._may_sweep():
            book = self._book
            useless = holdings.leftovers(inventory, book.records, book.tombstones)
            for context_id, tenant in useless.items():
                if context_id not in self._filling:
                    self._sweeper.sweep(context_id, tenant, [node_id])
        await self.settle()

    async def _may_sweep(self) -> bool:
        """Whether this coordinator leads and knows all that was reserved before the inventory it
        has: what a node holds without a reservation is then nobody's."""
        return bool(self._book.epoch()) and await self._catch_up() and bool(self._book.epoch())

    async def node_down(self, node_id: str) -> None:
        """A node died, left, or lost its memory."""
        self._holdings.lost(node_id)
        await self.settle()

    async def settle(self) -> None:
        """Puts every context in the state that the nodes justify."""
        await self._rebuild_unknown()
        for context_id in list(self._book.records):
            record = self._book.records.get(context_id)  # others work while the catalog writes
            if record is None or context_id in self._filling or context_id in self._book.repairing:
                continue
            if self._book.abandoned(record):
                settled = holdings.interrupted(record)
            elif record.filling:
                continue  # another coordinator is at it
            else:
                settled = holdings.settled(record, self._holdings.missing(record))
            if settled != record:
                _log.info("context %s is %s now", context_id, settled.state.name)
                self._book.show(settled)
                self._wake()
                await self._write(settled)

    async def rebuild(self) -> Rebuilt:
        """Asks every node for its inventory and writes what the catalog lacks."""
        await self._catch_up()
        wanted = {m.member_id for m in self._cluster.members() if m.report.node}
        wanted |= (await self._book.known_nodes()).keys()
        lost = await self._book.write_missing()
        before = set(self._book.records)
        answered = []
        for node_id in sorted(wanted):
            if (answer := await self._ask(node_id)) is not None:
                self._holdings.report(node_id, answer[0])
                answered.append(node_id)
        await self.settle()
        await self._rebuild_unknown(insist=True)
        found = sorted(lost | self._book.records.keys() - before)
        silent = sorted(wanted - set(answered))
        return Rebuilt(tuple(found), len(self._book.records), tuple(answered), tuple(silent))

    async def recheck(self) -> None:
        """Asks nodes again that should hold what is out of reach: a snapshot may have loaded."""
        wanted = {
            node_id
            for record in self._book.records.values()
            if record.state is ContextState.UNAVAILABLE
            for node_id in record.node_ids
        }
        for node_id in self._book.reachable(tuple(sorted(wanted))):
            await self.node_up(node_id)

    async def _ask(
        self, node_id: str
    ) -> tuple[list[ShardInventory], list[SessionInventory]] | None:
        """A node's shards and sessions; asks again while it is counted on and does not answer."""
        for attempt in range(ASK_ATTEMPTS):
            if not self._book.reachable((node_id,)):
                return None
            answer = await self._driver.inventory(node_id)
            if answer is not None:
                return answer
            await asyncio.sleep(ASK_PAUSE_S * (attempt + 1))
        return None

    async def _rebuild_unknown(self, *, insist: bool = False) -> None:
        """Writes contexts that only the nodes remember: the leader, or whoever was asked to."""
        if not self._book.epoch() and not insist:
            return
        unknown = self._holdings.unknown(self._book.records.keys() | self._book.tombstones)
        for context_id, by_node in unknown.items():
            addresses = {
                name: member.report.address
                for name in by_node
                if (member := self._cluster.member(name)) is not None
            }
            record = holdings.rebuild(
                context_id,
                by_node,
                addresses,
                self._models.served().values(),
                time.time(),
                self._replicas,
            )
            if record is not None:
                _log.info("context %s was found on %s", context_id, ", ".join(sorted(by_node)))
                self._book.show(record)
                self._wake()
                await self._write(record, insist=insist)

    async def _write(self, record: ContextRecord, *, insist: bool = False) -> None:
        """Writes as the leader; what another coordinator wrote meanwhile comes as news."""
        epoch = self._book.epoch()
        if not epoch and not insist:
            return
        try:
            await self._book.write(record, epoch=epoch)
        except Conflict as conflict:
            _log.info("context %s was not written: %s", record.context_id, conflict)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
