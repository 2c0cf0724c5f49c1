"""Follows what other coordinators do, through the catalog.

Once a second, and whenever a request names a context that is not known here, the coordinator
reports to the catalog and takes what changed. While the catalog does not answer it goes on with
what it knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from coordinator import holdings
from coordinator.catalog.base import ContextRecord, ContextState
from coordinator.cluster import Cluster
from coordinator.context_book import ContextBook
from coordinator.driver import Driver
from coordinator.filling import Filling
from coordinator.prefixes import PrefixIndex
from coordinator.settling import Settling
from longreach.errors import Aborted, LongreachError, Unavailable

BEAT_S = 1.0
WATCH_S = 0.3
_log = logging.getLogger(__name__)


class Following:
    """Brings the book up to date. `on_removed` ends the generations on a context;
    `on_route_changed` is told the context whose map another coordinator changed."""

    def __init__(
        self,
        book: ContextBook,
        cluster: Cluster,
        driver: Driver,
        held: holdings.Holdings,
        filling: Filling,
        settling: Settling,
        prefixes: PrefixIndex,
        on_removed: Callable[[str, LongreachError], Awaitable[None]],
        on_route_changed: Callable[[str], None],
    ) -> None:
        self._book = book
        self._cluster = cluster
        self._driver = driver
        self._holdings = held
        self._filling = filling
        self._settling = settling
        self._prefixes = prefixes
        self._on_removed = on_removed
        self._on_route_changed = on_route_changed
        self._turn = asyncio.Lock()
        self._answered = True

    async def run(self) -> None:
        """Follows until cancelled."""
        while True:
            await asyncio.sleep(BEAT_S)
            await self.follow()

    async def follow(self) -> bool:
        """Takes what changed since the last time; whether the catalog answered."""
        async with self._turn:
            try:
                news = await self._book.news(self._filling.__contains__)
            except Unavailable as error:
                if self._answered:
                    _log.warning("%s", error)
                self._answered = False
                return False
            self._answered = True
            for record in news.changed:
                await self._changed(record)
        for context_id in news.removed:
            await self._removed(context_id)
        if news.began_to_lead:
            _log.info("leading under epoch %d", self._book.epoch())
            for member in self._cluster.nodes():
                await self._settling.node_up(member.member_id)
        return True

    async def look_up(self, context_id: str) -> None:
        """Asks the catalog about a context that is not known here, or not as usable: another
        coordinator may have stored it since."""
        record = self._book.records.get(context_id)
        unusable = record is None or record.filling or record.state is ContextState.FAILED
        if unusable and context_id not in self._filling:
            await self.follow()

    async def watch(self, context_id: str) -> AsyncIterator[ContextRecord]:
        """The record of a context while another coordinator stores it; ends when that has ended,
        or its coordinator has. Yields nothing when nobody does."""
        await self.follow()
        while True:
            record = self._book.records.get(context_id)
            if record is None or context_id in self._filling or not record.filling:
                return
            if self._book.abandoned(record):
                return
            yield record
            await asyncio.sleep(WATCH_S)
            await self.follow()

    async def _removed(self, context_id: str) -> None:
        error = Aborted(f"context {context_id} was deleted", reason="CONTEXT_DELETED")
        fill = self._filling.get(context_id)
        if fill is not None:
            fill.fail(error)
            self._filling.abandon(fill)
        self._book.forget(context_id)
        self._holdings.dropped(context_id)
        self._prefixes.remove(context_id)
        await self._on_removed(context_id, error)

    async def _changed(self, record: ContextRecord) -> None:
        if not record.filling and record.state is not ContextState.FAILED:
            await self._ask_holders(record)
            record = holdings.settled(record, self._holdings.missing(record))
        known = self._book.records.get(record.context_id)
        self._book.show(record)
        if known is not None and known.shard_map.epoch < record.shard_map.epoch:
            self._on_route_changed(record.context_id)
        if record.state is ContextState.READY:
            with contextlib.suppress(Unavailable):  # only the lookup by prefix needs the tokens
                token_ids = await self._book.token_ids(record.context_id)
                if token_ids is not None:
                    self._prefixes.add(record.context_id, record.identity, token_ids)

    async def _ask_holders(self, record: ContextRecord) -> None:
        """Learns from the nodes themselves what they hold of a context."""
        nodes = self._book.reachable(record.node_ids)
        for node_id, held in (await self._driver.inventories(nodes, record.context_id)).items():
            self._holdings.learn(node_id, record.context_id, held)
