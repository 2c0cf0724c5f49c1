"""Stores contexts: reserves, prefills on a worker, and cleans up after failure or abandonment."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from coordinator.catalog.base import Conflict, ContextRecord, ContextState
from coordinator.cluster import Cluster
from coordinator.context_book import ContextBook
from coordinator.driver import Driver
from coordinator.fill import Fill
from coordinator.holdings import Holdings, without_tenant
from coordinator.placement.base import ClusterView, ContextToPlace, bytes_by_node
from coordinator.placement.planner import place
from coordinator.room import Promise, Refusals, cluster_view
from coordinator.sweeper import Sweeper
from longreach.errors import (
    ConnectionLost,
    Internal,
    LongreachError,
    ResourceExhausted,
    Unavailable,
)
from longreach.steps import PrefillSummary
from longreach.types import Identity, ShardMap

PREFILL_ATTEMPTS = 3
"""How often a prefill begins whose worker is lost."""
# Before the same worker is asked again: a connection that failed is not tried anew for as long.
_PREFILL_PAUSE_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """A context to store: what is placed where, in how many copies, for whom, and its tokens."""

    to_place: ContextToPlace
    identity: Identity
    token_ids: tuple[int, ...]
    name: str
    policy: str
    replicas: int = 1


class Filling:
    """Every context that is being stored.

    `index_reserve`: room for indexes, as a share of K and V. `fills_max`: more are refused.
    `on_filled` is told the record, its tokens and the worker that prefilled it.
    """

    def __init__(
        self,
        book: ContextBook,
        cluster: Cluster,
        driver: Driver,
        holdings: Holdings,
        sweeper: Sweeper,
        *,
        index_reserve: float,
        fills_max: int,
        on_filled: Callable[[ContextRecord, tuple[int, ...], str], None],
    ) -> None:
        self._book = book
        self._cluster = cluster
        self._driver = driver
        self._holdings = holdings
        self._sweeper = sweeper
        self._index_reserve = index_reserve
        self._fills_max = fills_max
        self._on_filled = on_filled
        self._fills: dict[str, Fill] = {}
        self._promises: dict[str, Promise] = {}
        self._prefills: Counter[str] = Counter()
        self._prefill_turns: dict[str, asyncio.Lock] = {}
        self._closed = ""
        self.refusals = Refusals()

    def __contains__(self, context_id: str) -> bool:
        return context_id in self._fills

    def get(self, context_id: str) -> Fill | None:
        """The fill of a context, if it is being stored."""
        return self._fills.get(context_id)

    def view(self) -> ClusterView:
        """The nodes with what is free beside what was promised."""
        return cluster_view(self._cluster, self._promises.values())

    def begin(self, order: Order) -> Fill:
        """Reserves room and starts; raises ResourceExhausted when there is none.

        A record that stands for the same context is replaced, what is left of it dropped.
        """
        if self._closed:
            raise Unavailable(self._closed, reason="DRAINING")
        if len(self._fills) >= self._fills_max:
            raise ResourceExhausted(
                f"{len(self._fills)} contexts are being stored and at most {self._fills_max} may; "
                "try again",
                reason="QUEUE_FULL",
                retry_after_s=5.0,
            )
        context_id = order.to_place.context_id
        shard_map = self._place(order)
        record = ContextRecord(
            context_id=context_id,
            name=order.name,
            identity=order.identity,
            state=ContextState.RESERVED,
            tokens=len(order.token_ids),
            kv_bytes=order.to_place.room_bytes,
            created_at=time.time(),
            shard_map=shard_map,
            owner=self._book.name,
            replicas=order.replicas,
        )
        stale = self._book.records.get(context_id)
        self._book.show(record)
        self._promises[context_id] = Promise(bytes_by_node(order.to_place, shard_map.shards))
        fill = self._fills[context_id] = Fill(record, self.abandon)
        fill.task = asyncio.create_task(self._run(fill, order.token_ids, stale))
        return fill

    def _place(self, order: Order) -> ShardMap:
        view = self.view()
        try:
            return place(order.to_place, view, order.policy, self._index_reserve, order.replicas)
        except ResourceExhausted:
            needed_bytes = order.to_place.room_bytes * (1 + self._index_reserve)
            self.refusals.note(int(needed_bytes), view)
            raise

    def abandon(self, fill: Fill) -> None:
        """Nobody waits for this context any more: stops its prefill and drops everything."""
        record = fill.record
        if self._fills.get(record.context_id) is not fill:
            return
        self._close(fill)
        self._book.forget(record.context_id)
        self._holdings.dropped(record.context_id)
        if fill.task is not None:
            fill.task.cancel()
        self._sweeper.sweep(
            record.context_id,
            record.identity.tenant,
            self._book.reachable(record.node_ids),
            after=fill.task,
            first=lambda: self._book.erase(record.context_id),
        )

    def abandon_all(self, error: LongreachError) -> None:
        """Ends every fill with an error."""
        for fill in list(self._fills.values()):
            fill.fail(error)
            self.abandon(fill)

    async def drain(self, why: str, timeout_s: float) -> None:
        """Begins nothing more and waits for the fills that run, at most so long."""
        self._closed = why
        tasks: Iterable[asyncio.Task[None]] = [f.task for f in self._fills.values() if f.task]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    async def _run(
        self, fill: Fill, token_ids: tuple[int, ...], stale: ContextRecord | None
    ) -> None:
        context_id = fill.record.context_id
        try:
            await self._sweeper.swept(context_id)
            await self._book.claim(fill.record, token_ids)
            await self._clear(fill.record, stale)
            await self._prefill(fill, token_ids)
        except Conflict as conflict:
            self._lose(fill, conflict)
        except LongreachError as error:
            await self._fail(fill, error)
        except Exception as problem:
            _log.exception("storing context %s failed", context_id)
            await self._fail(fill, Internal(f"storing failed with {type(problem).__name__}"))

    async def _clear(self, record: ContextRecord, stale: ContextRecord | None) -> None:
        """Drops what nodes may hold of the context from before, perhaps under another map."""
        node_ids = {*record.node_ids, *(stale.node_ids if stale else ())}
        nodes = self._book.reachable(tuple(sorted(node_ids)))
        await self._driver.drop(record.context_id, record.identity.tenant, nodes)
        self._holdings.dropped(record.context_id)

    async def _prefill(self, fill: Fill, token_ids: tuple[int, ...]) -> None:
        """Prefills on a worker, and from the start on another one when that is lost."""
        lost: list[str] = []
        while True:
            worker_id = self.choose_worker(fill.record.identity, avoid=lost)
            if worker_id in lost:
                await asyncio.sleep(_PREFILL_PAUSE_S)
            try:
                await self._prefill_on(worker_id, fill, token_ids)
                return
            except ConnectionLost as error:
                lost.append(worker_id)
                if len(lost) == PREFILL_ATTEMPTS:
                    raise
                _log.warning(
                    "context %s: worker %s was lost, the prefill begins anew: %s",
                    fill.record.context_id,
                    worker_id,
                    error.message,
                )
            await self._clear(fill.record, None)

    async def _prefill_on(self, worker_id: str, fill: Fill, token_ids: tuple[int, ...]) -> None:
        self._prefills[worker_id] += 1
        try:
            async with self._prefill_turns.setdefault(worker_id, asyncio.Lock()):
                await self._save(fill, state=ContextState.FILLING, prefill_fraction=0.0)
                summary = await self._follow(fill, worker_id, token_ids)
        finally:
            self._prefills[worker_id] -= 1
        self._holdings.sealed(fill.record)
        await self._save(
            fill, state=ContextState.READY, prefill_fraction=1.0, prefill_s=summary.total_s
        )
        self._close(fill)
        self._on_filled(fill.record, token_ids, worker_id)
        _log.info(
            "context %s: %d tokens prefilled in %.1f s by %s; %s",
            fill.record.context_id,
            len(token_ids),
            summary.total_s,
            worker_id,
            fill.record.shard_map.reason,
        )

    async def _follow(
        self, fill: Fill, worker_id: str, token_ids: tuple[int, ...]
    ) -> PrefillSummary:
        """Runs the prefill and shows its progress."""
        record = fill.record
        capability = self._driver.write_capability(record.context_id, record.identity.tenant)
        calls = self._driver.worker(worker_id).prefill(
            record.context_id, token_ids, record.identity, record.shard_map, capability
        )
        summary: PrefillSummary | None = None
        async for progress in calls:
            summary = progress.summary or summary
            self._promises[record.context_id].stored_fraction = progress.fraction
            self._show(fill, dataclasses.replace(fill.record, prefill_fraction=progress.fraction))
        if summary is None:
            raise Unavailable(f"worker {worker_id} ended the prefill without a summary")
        return summary

    def choose_worker(self, identity: Identity, avoid: Collection[str] = ()) -> str:
        """The worker with the fewest prefills of those that run the model; raises Unavailable.

        Those in `avoid` only when there is no other.
        """
        wanted = without_tenant(identity)
        able = [
            member.member_id
            for member in self._cluster.workers()
            if member.report.worker and member.report.worker.model.identity == wanted
        ]
        if not able:
            raise Unavailable(f"no worker that runs {identity.model} is alive", reason="NO_WORKER")
        return min(able, key=lambda worker_id: (worker_id in avoid, self._prefills[worker_id]))

    async def _save(self, fill: Fill, **changes: object) -> None:
        """Writes a change to the catalog first, then shows it."""
        record = dataclasses.replace(fill.record, **changes)  # type: ignore[arg-type]
        await self._book.write(record)
        self._show(fill, record)

    def _show(self, fill: Fill, record: ContextRecord) -> None:
        self._book.show(record)
        fill.update(record)

    def _lose(self, fill: Fill, conflict: Conflict) -> None:
        """Another coordinator stores or deleted the context: what the nodes hold is not ours."""
        self._close(fill)
        self._book.unknow(fill.record.context_id)
        fill.fail(conflict)

    async def _fail(self, fill: Fill, error: LongreachError) -> None:
        """Keeps the error, drops the KV."""
        record = dataclasses.replace(fill.record, state=ContextState.FAILED, error=error.message)
        self._book.show(record)
        self._close(fill)
        nodes = self._book.reachable(record.node_ids)
        self._sweeper.sweep(record.context_id, record.identity.tenant, nodes)
        fill.fail(error)
        await self._book.write(record)

    def _close(self, fill: Fill) -> None:
        self._fills.pop(fill.record.context_id, None)
        self._promises.pop(fill.record.context_id, None)
