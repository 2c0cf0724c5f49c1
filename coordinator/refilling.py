"""Computes KV again that no node has any more, from the context's token ids.

    UNAVAILABLE ──all holders of a shard gone──> REPAIRING ──> READY
                                                     └──failed──> UNAVAILABLE, tried again later

Only the lost span is prefilled: from the first position of a lost shard to the stop of the last.
What the nodes have of earlier positions is read back by the worker; the other shards stay. With
spans of positions on several nodes that is a part of the context, without it is the whole.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable

from coordinator import repairs
from coordinator.catalog.base import Conflict, ContextRecord, ContextState
from coordinator.context_book import ContextBook
from coordinator.driver import Driver
from coordinator.filling import Filling
from coordinator.holdings import Holdings
from coordinator.repairs import PlacementView
from longreach import telemetry
from longreach.errors import FailedPrecondition, LongreachError, NotFound, Unavailable
from longreach.types import Shard, Span

PAUSE_AFTER_FAILURE_S = 5.0
_log = logging.getLogger(__name__)
_REPREFILL_TOKENS = telemetry.counter("reprefill_tokens").bind()


class Refilling:
    """Contexts whose lost KV is computed again. `reprefill_tokens` counts positions computed so."""

    def __init__(
        self,
        book: ContextBook,
        driver: Driver,
        held: Holdings,
        filling: Filling,
        on_route_changed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._book = book
        self._driver = driver
        self._holdings = held
        self._filling = filling
        self._on_route_changed = on_route_changed
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}
        self.reprefill_tokens = 0

    def begin(self, record: ContextRecord, shards: tuple[Shard, ...], view: PlacementView) -> None:
        """Begins to compute a context's lost shards, unless that was tried a moment ago."""
        context_id = record.context_id
        if context_id in self._tasks or self._clock() < self._not_before.get(context_id, 0.0):
            return
        self._not_before[context_id] = self._clock() + PAUSE_AFTER_FAILURE_S
        self._book.repairing.add(context_id)
        task = self._tasks[context_id] = asyncio.create_task(self._run(record, shards, view))
        task.add_done_callback(lambda _: self._ended(context_id))

    async def close(self) -> None:
        """Gives up what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(
        self, record: ContextRecord, shards: tuple[Shard, ...], view: PlacementView
    ) -> None:
        context_id = record.context_id
        try:
            token_ids = await self._book.token_ids(context_id)
            if token_ids is None:
                return  # only the nodes knew them, and its error says which to bring back
            lost = Span(min(s.span.start for s in shards), max(s.span.stop for s in shards))
            placed = repairs.with_lost_placed(record, shards, view)
            repairing = dataclasses.replace(
                placed, state=ContextState.REPAIRING, prefill_fraction=0.0, error=""
            )
            if not await self._write(repairing):
                return
            _log.info("context %s: computing positions %s again", context_id, lost)
            await self._prefill(repairing, shards, token_ids[: lost.stop])
            if context_id not in self._book.records:  # deleted meanwhile
                await self._driver.drop(context_id, record.identity.tenant, placed.node_ids)
                return
            self.reprefill_tokens += len(lost)
            _REPREFILL_TOKENS.add(len(lost))
            self._take(repairing, shards)
            await self._settled(context_id, ContextState.READY, "")
            self._on_route_changed(context_id)
            _log.info("context %s: %d tokens were prefilled again", context_id, len(lost))
        except LongreachError as error:
            _log.warning("context %s is not computed again: %s", context_id, error)
            await self._settled(
                context_id,
                ContextState.UNAVAILABLE,
                f"{record.error}; computing it again failed: {error.message}",
            )

    async def _prefill(
        self, record: ContextRecord, shards: tuple[Shard, ...], token_ids: tuple[int, ...]
    ) -> None:
        context_id, tenant = record.context_id, record.identity.tenant
        names = [shard.shard_id for shard in shards]
        epoch = record.shard_map.epoch
        await self._drop_parts(record, names)
        calls = self._driver.worker(self._filling.choose_worker(record.identity)).prefill(
            context_id,
            token_ids,
            record.identity,
            record.shard_map,
            self._driver.write_capability(context_id, tenant),
            names,
            self._driver.place_capability(context_id, tenant, epoch),
        )
        done = False
        async for progress in calls:
            done = progress.summary is not None
            known = self._book.records.get(context_id)
            if known is None:
                raise NotFound(f"context {context_id} was deleted")
            self._book.show(dataclasses.replace(known, prefill_fraction=progress.fraction))
        if not done:
            raise Unavailable("the worker ended the prefill without a summary")

    async def _drop_parts(self, record: ContextRecord, shard_ids: list[str]) -> None:
        """Drops what an earlier attempt may have left half filled on the new holders."""
        lost = [s for s in record.shard_map.shards if s.shard_id in shard_ids]
        for node_id in sorted({node_id for shard in lost for node_id in shard.node_ids}):
            try:
                await self._driver.drop_shards(
                    node_id,
                    record.context_id,
                    record.identity.tenant,
                    shard_ids,
                    record.shard_map.epoch,
                )
            except FailedPrecondition as error:
                _log.info("%s: %s", node_id, error)

    def _take(self, record: ContextRecord, shards: tuple[Shard, ...]) -> None:
        names = {shard.shard_id for shard in shards}
        for shard in record.shard_map.shards:
            if shard.shard_id in names:
                for node_id in shard.node_ids:
                    self._holdings.copied(node_id, record.context_id, shard)

    async def _settled(self, context_id: str, state: ContextState, error: str) -> None:
        record = self._book.records.get(context_id)
        if record is not None and record.state is ContextState.REPAIRING:
            fraction = 1.0 if state is ContextState.READY else record.prefill_fraction
            await self._write(
                dataclasses.replace(record, state=state, error=error, prefill_fraction=fraction)
            )

    async def _write(self, record: ContextRecord) -> bool:
        """Shows and writes a record as the leader; whether the catalog took it, or will."""
        epoch = self._book.epoch()
        if not epoch:
            return False
        self._book.show(record)
        try:
            await self._book.write(record, epoch=epoch)
        except Conflict as conflict:
            _log.info("context %s was not written: %s", record.context_id, conflict)
            return False
        return True

    def _ended(self, context_id: str) -> None:
        self._tasks.pop(context_id, None)
        self._book.repairing.discard(context_id)
