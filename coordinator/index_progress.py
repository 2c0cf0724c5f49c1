"""How far the index over a context is, asked of its nodes and remembered for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from coordinator.catalog.base import ContextRecord, ContextState
from coordinator.driver import Driver
from longreach.types import ShardInventory

FRESH_S = 0.5
# A node that does not say in this time how far its index is, is left out of the figure.
ANSWER_S = 2.0
_REMEMBERED_MAX = 1024


@dataclass(frozen=True, slots=True)
class IndexSummary:
    """`fraction`: share of the heads that are built; `kind`: kinds that answer now, joined by
    "+"; `bytes`: of indexes, beside K and V; `error`: why some were not built and never will be."""

    fraction: float = 0.0
    kind: str = ""
    bytes: int = 0
    error: str = ""


def summarise(inventory: Iterable[ShardInventory]) -> IndexSummary:
    """The index over a context, from the inventories of its shards."""
    indexes = [item.index for item in inventory if item.sealed]
    total = sum(index.total for index in indexes)
    return IndexSummary(
        fraction=sum(index.built for index in indexes) / total if total else float(bool(indexes)),
        kind="+".join(sorted({index.serving_kind for index in indexes if index.serving_kind})),
        bytes=sum(index.bytes for index in indexes),
        error="; ".join(sorted({index.error for index in indexes if index.error})),
    )


class IndexProgress:
    """Summaries by context, at most `FRESH_S` seconds old."""

    def __init__(self, driver: Driver, clock: Callable[[], float] = time.monotonic) -> None:
        self._driver = driver
        self._clock = clock
        self._known: dict[str, tuple[float, IndexSummary]] = {}

    async def of(self, record: ContextRecord) -> IndexSummary:
        """The summary of a context; empty while it is not READY. Silent nodes are left out."""
        if record.state is not ContextState.READY:
            return IndexSummary()
        known = self._known.get(record.context_id)
        if known is not None and self._clock() - known[0] < FRESH_S:
            return known[1]
        answers = await self._driver.inventories(
            record.node_ids, record.context_id, timeout_s=ANSWER_S
        )
        summary = summarise(item for items in answers.values() for item in items)
        self._remember(record.context_id, summary)
        return summary

    async def of_all(self, records: Sequence[ContextRecord]) -> dict[str, IndexSummary]:
        """The summaries of many contexts, from one inventory of each node."""
        ready = [record for record in records if record.state is ContextState.READY]
        nodes = sorted({node_id for record in ready for node_id in record.node_ids})
        by_context: dict[str, list[ShardInventory]] = {}
        for items in (await self._driver.inventories(nodes, timeout_s=ANSWER_S)).values():
            for item in items:
                by_context.setdefault(item.context_id, []).append(item)
        summaries = {r.context_id: summarise(by_context.get(r.context_id, ())) for r in ready}
        return {r.context_id: summaries.get(r.context_id, IndexSummary()) for r in records}

    def _remember(self, context_id: str, summary: IndexSummary) -> None:
        if len(self._known) >= _REMEMBERED_MAX:
            self._known.clear()
        self._known[context_id] = (self._clock(), summary)
