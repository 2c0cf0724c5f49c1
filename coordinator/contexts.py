"""Contexts: stored once, found by content, watched while they fill, settled by what nodes hold.

    RESERVED ──> FILLING ──> READY <──> UNAVAILABLE ──> REPAIRING ──> READY
        │           │            shards out of reach;   computed again where no copy is left
        └───────────┴──> FAILED                         the error is kept, the KV dropped

A context whose last watcher leaves before READY is forgotten and dropped. `filling` stores them,
`settling` keeps their states true; this is what the rest of the coordinator uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from coordinator import tenancy
from coordinator.catalog.base import Catalog, Conflict, ContextRecord, ContextState
from coordinator.cluster import Cluster
from coordinator.config import CoordinatorConfig
from coordinator.context_book import ContextBook
from coordinator.driver import Driver
from coordinator.filling import Filling, Order
from coordinator.following import Following
from coordinator.holdings import Holdings, interrupted, settled
from coordinator.index_progress import IndexProgress, IndexSummary
from coordinator.models import Models
from coordinator.placement.base import ContextToPlace, check_room
from coordinator.placement.planner import place, policy_names
from coordinator.prefixes import PrefixIndex
from coordinator.refilling import Refilling
from coordinator.repairing import Limits, Repairing
from coordinator.requests import (
    NewContext,
    check_context_length,
    check_new_context,
    check_token_ids,
)
from coordinator.settling import Settling
from coordinator.sweeper import Sweeper
from longreach.errors import Aborted, FailedPrecondition, LongreachError, Unavailable
from longreach.steps import ModelInfo
from longreach.telemetry import tracing
from longreach.types import Identity, SessionInventory, Shard, ShardMap, Span, storage_dtype

STORE_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class ContextView:
    """A context with the state of its index, and the shards with fewer copies than wanted."""

    record: ContextRecord
    index: IndexSummary
    under_replicated: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class ContextProgress:
    """A context while it is stored; `found`: it was stored before."""

    record: ContextRecord
    found: bool


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A context that a request wants stored."""

    context_id: str
    identity: Identity
    token_ids: Sequence[int]
    name: str
    placement: str
    replicas: int


class Contexts:
    """Every context of the cluster.

    `on_delete` ends the generations on a context before its KV goes; `on_sessions` is told which
    sessions a node has open.
    """

    def __init__(
        self,
        catalog: Catalog,
        cluster: Cluster,
        driver: Driver,
        models: Models,
        config: CoordinatorConfig,
        on_delete: Callable[[str, LongreachError], Awaitable[None]],
        on_route_changed: Callable[[str], None],
        on_sessions: Callable[[list[SessionInventory]], None],
    ) -> None:
        self._cluster = cluster
        self._models = models
        self._config = config
        self._on_delete = on_delete
        self._last_worker: dict[str, str] = {}
        self._prefixes = PrefixIndex()
        self.tenant = tenancy.tenant_digest(
            config.cluster_secret.encode(), tenancy.DEFAULT_PRINCIPAL
        )
        self._book = ContextBook(catalog, cluster, config.name)
        self._holdings = Holdings()
        self._sweeper = Sweeper(driver)
        self._index = IndexProgress(driver)
        self._filling = Filling(
            self._book,
            cluster,
            driver,
            self._holdings,
            self._sweeper,
            index_reserve=config.index_reserve,
            fills_max=max(1, config.max_waiting),
            on_filled=self._filled,
        )
        self.settling = Settling(
            self._book,
            cluster,
            driver,
            models,
            self._holdings,
            self._filling,
            self._sweeper,
            on_sessions=on_sessions,
            catch_up=lambda: self.following.follow(),
            replicas=config.replicas,
        )
        pause_s = config.rebalance_pause_s
        self.repairing = Repairing(
            self._book,
            cluster,
            driver,
            self._holdings,
            self._filling,
            Limits(
                copies=config.repair_copies,
                grace_s=config.repair_grace_s,
                rebalance_pause_s=pause_s if pause_s >= 0 else None,
            ),
            Refilling(self._book, driver, self._holdings, self._filling, on_route_changed),
            on_sessions,
            on_route_changed,
        )
        self.following = Following(
            self._book,
            cluster,
            driver,
            self._holdings,
            self._filling,
            self.settling,
            self._prefixes,
            on_removed=on_delete,
            on_route_changed=on_route_changed,
        )

    async def start(self) -> None:
        """Loads the catalog. Nothing is READY until its nodes have registered."""
        await self._book.load()
        for record in list(self._book.records.values()):
            if self._book.abandoned(record):
                record = interrupted(record)
            if not record.filling:
                self._book.show(settled(record, self._holdings.missing(record)))
            token_ids = await self._book.token_ids(record.context_id)
            if token_ids is not None:
                self._prefixes.add(record.context_id, record.identity, token_ids)

    async def drain(self, grace_s: float) -> None:
        """Stores nothing more; what is being stored may finish within the grace."""
        await self._filling.drain("the coordinator is shutting down; ask another", grace_s)

    async def close(self) -> None:
        """Abandons what is still being stored and waits for the clean-up."""
        await self.repairing.close()
        self._filling.abandon_all(
            Unavailable("the coordinator is shutting down", reason="DRAINING")
        )
        await self._sweeper.close()

    # Reading.

    def count(self) -> int:
        """How many contexts there are, in any state."""
        return len(self._book.records)

    def states(self) -> Counter[ContextState]:
        """How many contexts are in each state."""
        return Counter(record.state for record in self._book.records.values())

    def leads(self) -> bool:
        """Whether this coordinator leads now."""
        return bool(self._book.epoch())

    def refused_bytes(self) -> int:
        """What the largest context lacked that was refused for want of memory since last asked."""
        return self._filling.refusals.take()

    @property
    def segments_under_replicated(self) -> int:
        """How many shards, of all contexts, have fewer copies within reach than are wanted."""
        stored = [record for record in self._book.records.values() if not record.filling]
        return sum(len(self._holdings.under_replicated(record)) for record in stored)

    @property
    def reprefill_tokens(self) -> int:
        """Positions whose KV this coordinator had computed again because no copy was left."""
        return self.repairing.reprefill_tokens

    async def views(self) -> list[ContextView]:
        """Every context of the tenant with the progress of its index, newest first."""
        own = [r for r in self._book.records.values() if r.identity.tenant == self.tenant]
        newest = sorted(own, key=lambda record: -record.created_at)
        indexes = await self._index.of_all(newest)
        return [self._view(record, indexes[record.context_id]) for record in newest]

    async def view(self, context_id: str) -> ContextView:
        """One context with the progress of its index; raises NotFound."""
        await self.following.look_up(context_id)
        record = self._book.find(context_id, self.tenant)
        return self._view(record, await self._index.of(self._readdressed(record)))

    async def ready(self, context_id: str) -> ContextRecord:
        """A context to generate on; raises what says why it cannot be used."""
        await self.following.look_up(context_id)
        await self.settling.given_time(context_id)
        record = self._readdressed(self._book.find(context_id, self.tenant))
        if record.state is ContextState.READY:
            return record
        if record.state is ContextState.UNAVAILABLE:
            raise Unavailable(
                f"context {context_id}: {record.error}",
                reason="CONTEXT_UNAVAILABLE",
                retry_after_s=2.0,
            )
        if record.state is ContextState.REPAIRING:
            raise Unavailable(
                f"context {context_id}: KV that no node has any more is being computed again, "
                f"{record.prefill_fraction:.0%} done",
                reason="CONTEXT_UNAVAILABLE",
                retry_after_s=2.0,
            )
        if record.state is ContextState.FAILED:
            raise FailedPrecondition(
                f"context {context_id} failed: {record.error}; create it again",
                reason="CONTEXT_FAILED",
            )
        raise FailedPrecondition(
            f"context {context_id} is {record.state.name}, {record.prefill_fraction:.0%} of its "
            "prefill done; ask again when it is READY",
            reason="CONTEXT_NOT_READY",
        )

    def longest_prefix(
        self, model: ModelInfo, token_ids: Sequence[int]
    ) -> tuple[ContextRecord, int] | None:
        """A READY context that begins as these tokens do, and how many of them it shares."""
        identity = dataclasses.replace(model.identity, tenant=self.tenant)
        found = self._prefixes.longest(identity, token_ids, self._is_ready)
        if found is None:
            return None
        context_id, stop = found
        return self._readdressed(self._book.records[context_id]), stop

    def last_worker(self, context_id: str) -> str:
        """The worker that used the context last, which may have it warm; empty if none."""
        return self._last_worker.get(context_id, "")

    def used_by(self, context_id: str, worker_id: str) -> None:
        """Notes which worker uses a context."""
        self._last_worker[context_id] = worker_id

    # Storing and deleting.

    async def create(self, request: NewContext) -> AsyncGenerator[ContextProgress, None]:
        """Stores what a client sent; closing the iterator early drops it."""
        span = tracing.begin("create context", request.traceparent)
        with tracing.around(span):
            async with contextlib.aclosing(self._create(request)) as progress:
                async for each in progress:
                    if span is not None:
                        span.set(
                            {
                                "longreach.context.id": each.record.context_id,
                                "longreach.context.tokens": each.record.tokens,
                                "longreach.context.found": each.found,
                            }
                        )
                    yield each

    async def _create(self, request: NewContext) -> AsyncGenerator[ContextProgress, None]:
        check_new_context(request, policy_names())
        model = self._models.choose(request.model)
        token_ids = await self._models.encode(model, request.prompt, starts=True)
        async with contextlib.aclosing(
            self.store(
                model,
                token_ids,
                name=request.name,
                placement=request.placement,
                replicas=request.replicas,
            )
        ) as progress:
            async for each in progress:
                yield each

    async def store(
        self,
        model: ModelInfo,
        token_ids: Sequence[int],
        *,
        name: str = "",
        placement: str = "",
        replicas: int = 0,
    ) -> AsyncGenerator[ContextProgress, None]:
        """Finds the context of these tokens, joins the one who is storing it, or stores it.

        The last progress is READY. Raises what made it fail; closing early abandons it, unless
        others wait for it too.
        """
        check_context_length(len(token_ids), model)
        check_token_ids(token_ids, model)
        identity = dataclasses.replace(model.identity, tenant=self.tenant)
        wanted = _Wanted(
            tenancy.context_id(identity, token_ids),
            identity,
            token_ids,
            name,
            placement or self._config.placement,
            replicas or self._config.replicas,
        )
        for attempt in range(1, STORE_ATTEMPTS + 1):
            try:
                async with contextlib.aclosing(self._store(wanted, model)) as progress:
                    async for each in progress:
                        yield each
                return
            except Conflict:
                if attempt == STORE_ATTEMPTS:
                    raise  # else another coordinator was faster: its context is found now

    async def _store(
        self, wanted: _Wanted, model: ModelInfo
    ) -> AsyncGenerator[ContextProgress, None]:
        context_id, token_ids = wanted.context_id, wanted.token_ids
        await self.settling.given_time(context_id)
        fill = self._filling.get(context_id)
        if fill is None:
            async for record in self.following.watch(context_id):
                yield ContextProgress(record, found=False)
            fill = self._filling.get(context_id)
        if fill is None:
            known = self._book.records.get(context_id)
            if known is not None and known.state is ContextState.READY:
                # Nodes do not tell the tokens.
                self._prefixes.add(context_id, wanted.identity, token_ids)
                yield ContextProgress(self._readdressed(known), found=True)
                return
            to_place = _to_place(context_id, Span(0, len(token_ids)), model, len(token_ids))
            order = Order(
                to_place,
                wanted.identity,
                tuple(token_ids),
                wanted.name,
                wanted.placement,
                wanted.replicas,
            )
            fill = self._filling.begin(order)
        async with contextlib.aclosing(fill.watch()) as watch:
            async for record in watch:
                yield ContextProgress(record, found=False)

    async def delete(self, context_id: str) -> int:
        """Forgets a context: its generations end, its KV goes; returns the bytes freed."""
        await self.following.look_up(context_id)
        record = self._book.find(context_id, self.tenant)
        error = Aborted(f"context {context_id} was deleted", reason="CONTEXT_DELETED")
        fill = self._filling.get(context_id)
        if fill is not None:
            fill.fail(error)
            self._filling.abandon(fill)
        self._book.forget(context_id)  # first of all, so that nobody begins on it meanwhile

        async def end_users() -> None:
            try:
                await self._book.erase(context_id)
            except Unavailable:
                self._book.show(record)
                raise
            self._holdings.dropped(context_id)
            self._last_worker.pop(context_id, None)
            self._prefixes.remove(context_id)
            await self._on_delete(context_id, error)

        # A task of its own: a client that leaves now must not leave half of it undone.
        return await asyncio.shield(
            self._sweeper.sweep(
                context_id,
                self.tenant,
                self._book.reachable(record.node_ids),
                first=end_users,
                until_gone=False,
            )
        )

    # Tails.

    def shard_map(self, context_id: str) -> ShardMap | None:
        """Where a context lives now, as far as this coordinator knows; None when it is gone."""
        record = self._book.records.get(context_id)
        return None if record is None else self._cluster.readdress(record.shard_map)

    def place_tail(self, session_id: str, model: ModelInfo, tokens: int) -> ShardMap:
        """Where a session without a context keeps the KV of its tokens."""
        to_place = _to_place(session_id, Span(0, 0), model, tokens)
        return place(
            to_place,
            self._filling.view(),
            self._config.placement,
            replicas=self._config.replicas,
        )

    def check_tail(self, record: ContextRecord, model: ModelInfo, tokens: int) -> None:
        """Raises ResourceExhausted when the context's nodes lack room for a session's tokens."""
        view = self._filling.view()
        alive = {node.node_id for node in view.nodes}
        shards = tuple(s for s in record.shard_map.shards if set(s.node_ids) <= alive)
        on_alive = dataclasses.replace(record.shard_map, shards=shards)
        check_room(_to_place(record.context_id, Span(0, 0), model, tokens), on_alive, view, 0.0)

    def _is_ready(self, context_id: str) -> bool:
        record = self._book.records.get(context_id)
        return record is not None and record.state is ContextState.READY

    def _filled(self, record: ContextRecord, token_ids: tuple[int, ...], worker_id: str) -> None:
        self._prefixes.add(record.context_id, record.identity, token_ids)
        self.used_by(record.context_id, worker_id)

    def _view(self, record: ContextRecord, index: IndexSummary) -> ContextView:
        lacking = () if record.filling else tuple(self._holdings.under_replicated(record))
        return ContextView(self._readdressed(record), index, lacking)

    def _readdressed(self, record: ContextRecord) -> ContextRecord:
        return dataclasses.replace(record, shard_map=self._cluster.readdress(record.shard_map))


def _to_place(context_id: str, span: Span, model: ModelInfo, tokens: int) -> ContextToPlace:
    itemsize = storage_dtype(model.identity.dtype).itemsize
    return ContextToPlace(context_id, span, model.layers, itemsize, tokens)
