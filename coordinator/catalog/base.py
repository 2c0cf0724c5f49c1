"""What a catalog stores and the interface every catalog implements."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from longreach.errors import Aborted
from longreach.types import Identity, ShardMap

TOMBSTONE_TTL_S = 30 * 24 * 3600.0
"""How long a removal is remembered: longer than a node stays away and comes back."""


class ContextState(enum.Enum):
    """State of a context (the values are those of the public protocol)."""

    RESERVED = 1
    FILLING = 2
    READY = 3
    UNAVAILABLE = 4
    FAILED = 5
    REPAIRING = 6


@dataclass(frozen=True, slots=True)
class ContextRecord:
    """A context as the coordinators know it.

    `tokens` counts tokens, `kv_bytes` bytes of K and V of one copy, `created_at` is in Unix
    seconds, `prefill_s` in seconds and 0 until READY. `owner` is the coordinator that stores it,
    or that stored it. `replicas` is how many copies of each shard are wanted.
    """

    context_id: str
    name: str
    identity: Identity
    state: ContextState
    tokens: int
    kv_bytes: int
    created_at: float
    shard_map: ShardMap
    prefill_fraction: float = 0.0
    prefill_s: float = 0.0
    error: str = ""
    owner: str = ""
    replicas: int = 1

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Every node that holds a part, in name order."""
        return tuple(sorted({n for shard in self.shard_map.shards for n in shard.node_ids}))

    @property
    def filling(self) -> bool:
        """Whether its owner is storing it."""
        return self.state in (ContextState.RESERVED, ContextState.FILLING)


class Conflict(Aborted):
    """The stored record is not the one that the writer knew; read it again."""

    default_reason = "CATALOG_CONFLICT"


@dataclass(frozen=True, slots=True)
class Lease:
    """Who leads. `epoch` grows with every change of leader; `ttl_s` counts from the request."""

    holder: str
    epoch: int
    ttl_s: float

    def known_beside(self, epoch: int) -> Lease:
        """This lease as a catalog confirms it that knows `epoch`: not valid under a higher one."""
        return self if self.epoch >= epoch else Lease(self.holder, epoch, 0.0)


@dataclass(frozen=True, slots=True)
class Beat:
    """What a coordinator hears when it reports to the catalog.

    `generation` names one life of the stored data: another one means that it was lost. `revision`
    is that of the last change; `records` are those changed since the revision asked for, with
    their revisions, and `removed` the ids removed since, with theirs. `present` are the
    coordinators that reported lately.
    """

    lease: Lease
    present: frozenset[str]
    generation: str
    revision: int
    records: tuple[tuple[ContextRecord, int], ...]
    removed: tuple[tuple[str, int], ...]


class Catalog(ABC):
    """Records of contexts, for one coordinator or several at once.

    Every write has a revision, larger than any before. A write that expects the revision it knows
    fails with Conflict where another coordinator was faster. Removal leaves a tombstone, so that a
    node that was away when a context was deleted does not bring it back; storing the context again
    lifts it, and it may expire after a month. Every method raises Unavailable while the storage is
    out of reach.
    """

    @abstractmethod
    async def put(
        self,
        record: ContextRecord,
        token_ids: Sequence[int] | None = None,
        *,
        expected: int | None = None,
        epoch: int = 0,
    ) -> int:
        """Stores a record, replacing an older one; keeps the stored tokens when given none.

        Returns its revision. Raises Conflict unless the stored record has the `expected` revision
        (0: there is none; None: whatever there is), and where `epoch`, the writer's as leader, is
        not 0 and there was another leader since.
        """

    @abstractmethod
    async def get(self, context_id: str) -> ContextRecord | None:
        """The record, or None."""

    @abstractmethod
    async def token_ids(self, context_id: str) -> tuple[int, ...] | None:
        """The context's tokens; None where they are not known (rebuilt from inventories)."""

    @abstractmethod
    async def records(self) -> list[ContextRecord]:
        """Every record, newest first."""

    @abstractmethod
    async def remove(self, context_id: str) -> None:
        """Forgets a context and leaves a tombstone."""

    @abstractmethod
    async def tombstones(self) -> set[str]:
        """Ids that were removed and not stored again."""

    @abstractmethod
    async def put_nodes(self, addresses: Mapping[str, str], *, epoch: int) -> None:
        """Replaces the known nodes (id to host:port); raises Conflict for an older leader."""

    @abstractmethod
    async def nodes(self) -> dict[str, str]:
        """The nodes that the last leader knew, id to host:port."""

    @abstractmethod
    async def beat(
        self, coordinator: str, since: int, known_epoch: int = 0, lease: Lease | None = None
    ) -> Beat:
        """Reports that a coordinator lives, asks for the lease, reads what changed.

        `known_epoch` is the highest that this coordinator has seen, so that epochs grow even where
        the storage was lost. With a `lease` the leader was elected elsewhere: the catalog takes its
        epoch for the leading one, or, where it knows a higher one, answers with that and no time.
        """

    @abstractmethod
    async def close(self) -> None:
        """Releases the storage."""
