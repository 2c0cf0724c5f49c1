"""The records of all contexts: in memory for reading, in the catalog for the other coordinators."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from coordinator.catalog.base import Beat, Catalog, Conflict, ContextRecord
from coordinator.cluster import Cluster
from coordinator.leadership import Leadership
from longreach.errors import NotFound, Unavailable

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class News:
    """What other coordinators did; `began_to_lead`: this one leads from now on."""

    changed: tuple[ContextRecord, ...]
    removed: tuple[str, ...]
    began_to_lead: bool


class ContextBook:
    """What the coordinator `name` knows of every context.

    States that follow from the cluster are decided elsewhere; the book only keeps them. `records`
    and `tombstones` mirror the catalog, and run ahead of it while it writes; `repairing` are those
    whose lost KV this coordinator has computed again just now. Reading never waits
    for the catalog. A write that does not reach it is kept and made up for when it answers again;
    only `claim` and `erase` insist.
    """

    def __init__(
        self,
        catalog: Catalog,
        cluster: Cluster,
        name: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.records: dict[str, ContextRecord] = {}
        self.tombstones: set[str] = set()
        self.repairing: set[str] = set()
        self._catalog = catalog
        self._cluster = cluster
        self._clock = clock
        self._leadership = Leadership(name)
        self._revisions: dict[str, int] = {}
        self._unwritten: set[str] = set()
        self._writing: dict[str, asyncio.Lock] = {}
        self._writers: Counter[str] = Counter()
        self._heard = 0
        self._generation = ""
        self._present: frozenset[str] = frozenset()
        self._nodes_written: dict[str, str] | None = None

    async def load(self) -> None:
        """Reads the catalog. Raises Unavailable when it does not answer."""
        self.tombstones = await self._catalog.tombstones()
        beat = await self._beat()
        self._generation = beat.generation
        self._heard = beat.revision
        self.records = {record.context_id: record for record, _ in beat.records}
        self._revisions = {record.context_id: number for record, number in beat.records}

    def find(self, context_id: str, tenant: str) -> ContextRecord:
        """A tenant's context; raises NotFound."""
        record = self.records.get(context_id)
        if record is None or record.identity.tenant != tenant:
            raise NotFound(
                f"no context {context_id!r}; ListContexts names those stored", reason="NO_CONTEXT"
            )
        return record

    def show(self, record: ContextRecord) -> None:
        """Replaces a record in memory only."""
        self.records[record.context_id] = record
        self.tombstones.discard(record.context_id)

    async def claim(self, record: ContextRecord, token_ids: tuple[int, ...]) -> None:
        """Writes the record of a context that this coordinator is about to store.

        Raises Conflict when another one stores or changed it, Unavailable without the catalog.
        """
        context_id = record.context_id
        async with self._turn(context_id):
            self._revisions[context_id] = await self._catalog.put(
                record, token_ids, expected=self._revisions.get(context_id, 0)
            )

    async def write(self, record: ContextRecord, *, epoch: int = 0) -> None:
        """Writes a record to the catalog only, later if it does not answer now.

        Raises Conflict when another coordinator changed it, or `epoch` is that of an older leader.
        """
        context_id = record.context_id
        try:
            async with self._turn(context_id):
                self._revisions[context_id] = await self._catalog.put(
                    record, expected=self._revisions.get(context_id, 0), epoch=epoch
                )
            self._unwritten.discard(context_id)
        except Conflict:
            self._heard = 0  # so that the next news bring the record that is stored
            raise
        except Unavailable as error:
            self._unwritten.add(context_id)
            _log.warning("context %s will be written later: %s", context_id, error)

    @contextlib.asynccontextmanager
    async def _turn(self, context_id: str) -> AsyncIterator[None]:
        """One write of a context at a time, in the order of the calls: the second must expect the
        revision that the first got, or it would conflict with this coordinator itself."""
        lock = self._writing.setdefault(context_id, asyncio.Lock())
        self._writers[context_id] += 1
        try:
            async with lock:
                yield
        finally:
            self._writers[context_id] -= 1
            if not self._writers[context_id]:
                del self._writers[context_id], self._writing[context_id]

    async def token_ids(self, context_id: str) -> tuple[int, ...] | None:
        """A context's tokens, or None where they are not known."""
        return await self._catalog.token_ids(context_id)

    def forget(self, context_id: str) -> None:
        """Removes a context from memory and leaves a tombstone."""
        self.records.pop(context_id, None)
        self.tombstones.add(context_id)

    def unknow(self, context_id: str) -> None:
        """Removes a context from memory; the catalog knows better, and the next news tell."""
        self.records.pop(context_id, None)
        self._revisions.pop(context_id, None)
        self._heard = 0

    async def erase(self, context_id: str) -> None:
        """Removes a context from the catalog, which leaves a tombstone too."""
        await self._catalog.remove(context_id)
        self._revisions.pop(context_id, None)

    def reachable(self, node_ids: tuple[str, ...]) -> list[str]:
        """Those of the nodes that are alive or only silent for a moment."""
        members = [self._cluster.member(node_id) for node_id in node_ids]
        return [m.member_id for m in members if m is not None and m.reachable]

    # Among several coordinators.

    def epoch(self) -> int:
        """The fencing epoch of this coordinator as the leader; 0 when it does not lead."""
        return self._leadership.epoch(self._clock())

    @property
    def leader(self) -> str:
        """The name of the coordinator that leads, as last heard."""
        return self._leadership.leader

    def abandoned(self, record: ContextRecord) -> bool:
        """Whether a context is being stored by nobody: its owner is gone, or has restarted as this
        coordinator, which does not know of it."""
        return record.filling and (record.owner == self.name or record.owner not in self._present)

    async def news(self, is_own: Callable[[str], bool]) -> News:
        """Reports to the catalog and returns what others changed; raises Unavailable.

        Contexts for which `is_own` holds are being stored here, so that only their removal is
        news. A catalog that lost its data gets back what this coordinator knows.
        """
        before = self.epoch()
        beat = await self._beat()
        if beat.generation != self._generation:
            self._generation = beat.generation
            await self._restore()
            beat = await self._beat()
        self._heard = beat.revision
        await self._make_up()
        # What is being written here is no news, though the catalog may have it already.
        changed = [
            self._take(record, number)
            for record, number in beat.records
            if number > self._revisions.get(record.context_id, 0)
            and not is_own(record.context_id)
            and record.context_id not in self._writers
        ]
        removed = [
            context_id
            for context_id, number in beat.removed
            if context_id in self.records and number > self._revisions.get(context_id, number)
        ]
        for context_id in removed:
            self._revisions.pop(context_id, None)
        gone = {context_id for context_id, _ in beat.removed}
        self.tombstones |= gone - self.records.keys() | set(removed)
        await self._publish_nodes()
        return News(tuple(changed), tuple(removed), bool(self.epoch()) and self.epoch() != before)

    async def known_nodes(self) -> dict[str, str]:
        """The nodes that the last leader knew, id to host:port."""
        return await self._catalog.nodes()

    async def write_missing(self) -> set[str]:
        """Writes the records that the catalog lost; returns their ids."""
        stored = {record.context_id for record in await self._catalog.records()}
        lost = {name for name, each in self.records.items() if name not in stored}
        lost = {name for name in lost if not self.records[name].filling}
        for context_id in lost:
            self._revisions.pop(context_id, None)
            await self.write(self.records[context_id])
        return lost

    async def _beat(self) -> Beat:
        asked_at = self._clock()
        beat = await self._catalog.beat(self.name, self._heard, self._leadership.known_epoch)
        self._leadership.answered(beat.lease, asked_at)
        self._present = beat.present
        return beat

    def _take(self, record: ContextRecord, number: int) -> ContextRecord:
        self._revisions[record.context_id] = number
        return record

    async def _restore(self) -> None:
        _log.warning("the catalog lost its data; writing %d contexts again", len(self.records))
        self._heard = 0
        self._revisions.clear()
        self._nodes_written = None
        for context_id in self.tombstones:
            await self._catalog.remove(context_id)
        for record in list(self.records.values()):
            try:
                await self.write(record)
            except Conflict:
                continue  # another coordinator wrote it first

    async def _make_up(self) -> None:
        """Writes what could not be written when it was due."""
        for context_id in list(self._unwritten):
            self._unwritten.discard(context_id)
            record = self.records.get(context_id)
            if record is None:
                continue
            try:
                await self.write(record)
            except Conflict:
                continue  # what another coordinator wrote meanwhile comes as news

    async def _publish_nodes(self) -> None:
        """Writes the nodes where they changed, as the leader."""
        nodes = {m.member_id: m.report.address for m in self._cluster.members() if m.report.node}
        epoch = self.epoch()
        if not epoch or not nodes or nodes == self._nodes_written:
            return
        try:
            await self._catalog.put_nodes(nodes, epoch=epoch)
            self._nodes_written = nodes
        except Conflict as conflict:
            _log.info("the nodes were not written: %s", conflict)
