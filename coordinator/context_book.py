"""The records of all contexts: in memory for reading, in the catalog for good."""

from __future__ import annotations

from coordinator.catalog.base import Catalog, ContextRecord
from coordinator.cluster import Cluster
from longreach.errors import NotFound


class ContextBook:
    """What the coordinator knows of every context.

    States that follow from the cluster are decided elsewhere; the book only keeps them. `records`
    and `tombstones` mirror the catalog, and run ahead of it while it writes.
    """

    def __init__(self, catalog: Catalog, cluster: Cluster) -> None:
        self._catalog = catalog
        self._cluster = cluster
        self.records: dict[str, ContextRecord] = {}
        self.tombstones: set[str] = set()

    async def load(self) -> None:
        """Reads the catalog."""
        self.tombstones = await self._catalog.tombstones()
        self.records = {record.context_id: record for record in await self._catalog.records()}

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

    async def write(self, record: ContextRecord, token_ids: tuple[int, ...] | None = None) -> None:
        """Writes a record to the catalog only."""
        await self._catalog.put(record, token_ids)

    async def token_ids(self, context_id: str) -> tuple[int, ...] | None:
        """A context's tokens, or None where they are not known."""
        return await self._catalog.token_ids(context_id)

    def forget(self, context_id: str) -> None:
        """Removes a context from memory and leaves a tombstone."""
        self.records.pop(context_id, None)
        self.tombstones.add(context_id)

    async def erase(self, context_id: str) -> None:
        """Removes a context from the catalog, which leaves a tombstone too."""
        await self._catalog.remove(context_id)

    def reachable(self, node_ids: tuple[str, ...]) -> list[str]:
        """Those of the nodes that are alive or only silent for a moment."""
        members = [self._cluster.member(node_id) for node_id in node_ids]
        return [m.member_id for m in members if m is not None and m.reachable]
