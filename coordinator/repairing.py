"""Carries repairs out, as the leader: copies shards from node to node, then changes the maps.

A step decides by `repairs`, begins what it says and returns; copies run in tasks of their own. The
map changes only once a copy is sealed, under a new placement epoch, in memory and in the catalog,
which refuses it from a coordinator that leads no longer. What a map no longer places on a node is
dropped there when no session over the context is open on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from coordinator import repairs
from coordinator.catalog.base import Conflict, ContextRecord
from coordinator.cluster import DEAD_AFTER_S, Cluster
from coordinator.context_book import ContextBook
from coordinator.driver import Driver
from coordinator.filling import Filling
from coordinator.holdings import Holdings
from coordinator.refilling import Refilling
from coordinator.repairs import Copy, PlacementView
from longreach import telemetry
from longreach.errors import FailedPrecondition, LongreachError
from longreach.types import SessionInventory

STEP_S = 1.0
PAUSE_AFTER_FAILURE_S = 5.0
ASK_SESSIONS_S = 5.0
_log = logging.getLogger(__name__)
_COPIES_DONE = telemetry.counter("repairs").bind(result="done")
_COPIES_FAILED = telemetry.counter("repairs").bind(result="failed")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is repaired at once.

    `copies` run at a time. `grace_s`: how long a node may be dead before its shards are copied
    elsewhere, and may take to register after this coordinator's start. Moves that even
    out memory are `rebalance_pause_s` apart; None for no such moves.
    """

    copies: int = 2
    grace_s: float = 20.0
    rebalance_pause_s: float | None = 10.0


@dataclass(frozen=True, slots=True)
class Evacuation:
    """What is left on a node that is to be emptied: shards and bytes of K and V that the maps still
    place there, and sessions that are open there. `stuck`: nothing more can be done for the shards.
    """

    shards: int
    bytes: int
    sessions: int
    stuck: bool = False


class _Running:
    """A copy on its way."""

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self.bytes_copied = 0
        self.task: asyncio.Task[None] | None = None


class Repairing:
    """Repairs, moves and drops. `on_route_changed` is told the context whose map has changed,
    `on_sessions` what is open on a node where shards are to be dropped."""

    def __init__(
        self,
        book: ContextBook,
        cluster: Cluster,
        driver: Driver,
        held: Holdings,
        filling: Filling,
        limits: Limits,
        refilling: Refilling,
        on_sessions: Callable[[list[SessionInventory]], None],
        on_route_changed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._book = book
        self._cluster = cluster
        self._driver = driver
        self._holdings = held
        self._filling = filling
        self._limits = limits
        self._refilling = refilling
        self._on_sessions = on_sessions
        self._on_route_changed = on_route_changed
        self._clock = clock
        self._patient_until = clock() + DEAD_AFTER_S + limits.grace_s
        self._running: dict[tuple[str, str], _Running] = {}
        self._not_before: dict[tuple[str, str], float] = {}
        self._rest_until = 0.0
        self._copied = asyncio.Event()
        self._sessions_asked: dict[str, float] = {}
        self.copies_done = 0
        self.bytes_copied = 0

    @property
    def copies_running(self) -> int:
        """Copies of shards that are under way."""
        return len(self._running)

    @property
    def reprefill_tokens(self) -> int:
        """Positions that were computed again."""
        return self._refilling.reprefill_tokens

    async def run(self) -> None:
        """Repairs until cancelled: once a second, and at once when a copy has made room for the
        next."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STEP_S):
                    await self._copied.wait()
            self._copied.clear()
            try:
                await self.step()
            except LongreachError as error:
                _log.warning("repairs are put off: %s", error)
            except Exception:  # the next step sees the world anew; without one nothing is repaired
                _log.exception("a step of the repairs failed")

    async def step(self) -> None:
        """Begins what is to be done now; does nothing unless this coordinator leads."""
        if not self._book.epoch():
            return  # what is under way ends by itself; its outcome is fenced
        view, now = self.view(), self._clock()
        for record in self._stored():
            if not self._busy_with(record.context_id):
                await self._change(record.context_id, lambda r: repairs.revised(r, view, now))
        for copy in repairs.repairs(self._stored(), self.view(), now):
            self._begin(copy)
        for record, shards in repairs.lost(self._stored(), self.view(), now):
            self._refilling.begin(record, shards, self.view())
        pause_s = self._limits.rebalance_pause_s
        if not self._running and pause_s is not None and now >= self._rest_until:
            for move in repairs.moves(self._stored(), self.view(), now):
                self._rest_until = now + pause_s
                self._begin(move)
        await self._drop_surplus()

    async def close(self) -> None:
        """Cancels every copy and prefill."""
        await self._refilling.close()
        tasks = [each.task for each in self._running.values() if each.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def view(self) -> PlacementView:
        """What repairs are decided from, now."""
        now = self._clock()
        put_off = {key for key, time_s in self._not_before.items() if now < time_s}
        return PlacementView(
            members={member.member_id: member for member in self._cluster.members()},
            heard=self._holdings.nodes(),
            nodes=self._filling.view().nodes,
            holders=self._holdings.holders,
            patient_until=self._patient_until,
            grace_s=self._limits.grace_s,
            busy=self._running.keys() | put_off,
        )

    def evacuation(self, node_id: str) -> Evacuation:
        """How far a node that drains has been emptied."""
        records = self._stored()
        if node_id in self._holdings.nodes():
            left = repairs.remaining(records, node_id, self._holdings.holders)
        else:  # not asked yet: whatever the maps place there may be there
            left = repairs.remaining(records, node_id, lambda context_id, shard: (node_id,))
        view = dataclasses.replace(self.view(), busy=())
        possible = repairs.repairs(records, view, self._clock())
        revisable = any(
            repairs.revised(record, view, self._clock()) != record
            for record in records
            if node_id in record.node_ids
        )
        hopeful = revisable or any(node_id in copy.shard.node_ids for copy in possible)
        by_id = {record.context_id: record for record in records}
        member = self._cluster.member(node_id)
        return Evacuation(
            len(left),
            sum(repairs.shard_bytes(by_id[context_id], shard) for context_id, shard in left),
            member.report.node.sessions if member and member.report.node else 0,
            stuck=bool(left) and not hopeful and node_id in view.heard and bool(self._book.epoch()),
        )

    def _stored(self) -> list[ContextRecord]:
        return [
            record
            for record in self._book.records.values()
            if record.context_id not in self._filling
            and record.context_id not in self._book.repairing
            and not record.filling
        ]

    def _busy_with(self, context_id: str) -> bool:
        return any(name == context_id for name, _ in self._running)

    def _begin(self, copy: Copy) -> None:
        key = copy.context_id, copy.shard.shard_id
        if key in self._running or len(self._running) >= self._limits.copies:
            return
        running = self._running[key] = _Running(copy)
        running.task = asyncio.create_task(self._copy(running))
        running.task.add_done_callback(lambda _: self._ended(key))

    def _ended(self, key: tuple[str, str]) -> None:
        self._running.pop(key, None)
        self._copied.set()

    async def _copy(self, running: _Running) -> None:
        copy = running.copy
        record = self._book.records[copy.context_id]
        began = self._clock()
        _log.info("%s", copy)
        try:
            async for progress in self._driver.copy(
                copy, record.identity.tenant, record.shard_map.epoch + 1
            ):
                running.bytes_copied = progress.bytes_copied
        except LongreachError as error:
            _log.warning("%s failed: %s", copy, error)
            _COPIES_FAILED.add()
            key = copy.context_id, copy.shard.shard_id
            self._not_before[key] = self._clock() + PAUSE_AFTER_FAILURE_S
            return
        except Exception:
            _log.exception("%s failed", copy)
            _COPIES_FAILED.add()
            return
        if copy.context_id not in self._book.records:  # deleted meanwhile, where it was known
            await self._driver.drop(copy.context_id, record.identity.tenant, [copy.target])
            return
        self.copies_done += 1
        _COPIES_DONE.add()
        self.bytes_copied += running.bytes_copied
        self._holdings.copied(copy.target, copy.context_id, copy.shard)
        _log.info("%s: %d bytes in %.1f s", copy, running.bytes_copied, self._clock() - began)
        target = self._cluster.member(copy.target)
        address = target.report.address if target else ""
        await self._change(copy.context_id, lambda r: repairs.placed(r, copy, address))

    async def _change(
        self, context_id: str, change: Callable[[ContextRecord], ContextRecord]
    ) -> None:
        """Changes a map, as the leader, unless the context is gone or being stored anew."""
        record = self._book.records.get(context_id)
        epoch = self._book.epoch()
        if record is None or record.filling or context_id in self._filling or not epoch:
            return
        changed = change(record)
        if changed == record:
            return
        _log.info("context %s: placement epoch %d", context_id, changed.shard_map.epoch)
        self._book.show(changed)
        try:
            await self._book.write(changed, epoch=epoch)
        except Conflict as conflict:
            _log.info("the map of %s was not written: %s", context_id, conflict)
            return
        self._on_route_changed(context_id)

    async def _drop_surplus(self) -> None:
        """Drops what maps no longer place where it is, while enough copies are elsewhere."""
        for drop in repairs.surplus(
            self._stored(), self.view(), self._clock(), self._holdings.sealed_on
        ):
            record = self._book.records[drop.context_id]
            try:
                await self._driver.drop_shards(
                    drop.node_id,
                    drop.context_id,
                    record.identity.tenant,
                    drop.shard_ids,
                    record.shard_map.epoch,
                )
            except FailedPrecondition:
                await self._report_sessions(drop.node_id)
                continue  # a session is open there: later
            except LongreachError as error:
                _log.info("shards of %s stay on %s: %s", drop.context_id, drop.node_id, error)
                continue
            self._holdings.gave_up(drop.node_id, drop.context_id, drop.shard_ids)

    async def _report_sessions(self, node_id: str) -> None:
        """Tells which sessions are open on a node, so that those that have ended elsewhere, or
        moved before they ended, are closed there too."""
        if self._clock() < self._sessions_asked.get(node_id, 0.0):
            return
        self._sessions_asked[node_id] = self._clock() + ASK_SESSIONS_S
        answer = await self._driver.inventory(node_id)
        if answer is not None:
            self._on_sessions(answer[1])
