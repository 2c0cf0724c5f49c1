"""A catalog whose leader a Kubernetes Lease names in place of the catalog itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from coordinator.catalog.base import Beat, Catalog, ContextRecord, Lease
from coordinator.kubernetes.lease_keeper import LeaseKeeper


class ElectedCatalog(Catalog):
    """Hands everything to `catalog`, and every beat the leader that `keeper` knows. The catalog
    still refuses writes of an epoch that has passed."""

    def __init__(self, catalog: Catalog, keeper: LeaseKeeper) -> None:
        self._catalog = catalog
        self._keeper = keeper

    async def beat(
        self, coordinator: str, since: int, known_epoch: int = 0, lease: Lease | None = None
    ) -> Beat:
        """Reports to the catalog, under the leadership that the Lease says."""
        self._keeper.known_epoch = max(self._keeper.known_epoch, known_epoch)
        beat = await self._catalog.beat(
            coordinator, since, known_epoch, lease=lease or self._keeper.lease()
        )
        self._keeper.known_epoch = max(self._keeper.known_epoch, beat.lease.epoch)
        return beat

    async def put(
        self,
        record: ContextRecord,
        token_ids: Sequence[int] | None = None,
        *,
        expected: int | None = None,
        epoch: int = 0,
    ) -> int:
        """Stores a record (see Catalog.put)."""
        return await self._catalog.put(record, token_ids, expected=expected, epoch=epoch)

    async def get(self, context_id: str) -> ContextRecord | None:
        """The record, or None."""
        return await self._catalog.get(context_id)

    async def token_ids(self, context_id: str) -> tuple[int, ...] | None:
        """The context's tokens, or None."""
        return await self._catalog.token_ids(context_id)

    async def records(self) -> list[ContextRecord]:
        """Every record, newest first."""
        return await self._catalog.records()

    async def remove(self, context_id: str) -> None:
        """Forgets a context and leaves a tombstone."""
        await self._catalog.remove(context_id)

    async def tombstones(self) -> set[str]:
        """Ids that were removed and not stored again."""
        return await self._catalog.tombstones()

    async def put_nodes(self, addresses: Mapping[str, str], *, epoch: int) -> None:
        """Replaces the known nodes."""
        await self._catalog.put_nodes(addresses, epoch=epoch)

    async def nodes(self) -> dict[str, str]:
        """The nodes that the last leader knew."""
        return await self._catalog.nodes()

    async def close(self) -> None:
        """Releases the storage."""
        await self._catalog.close()
