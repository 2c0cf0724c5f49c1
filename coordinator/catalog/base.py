"""What a catalog stores and the interface every catalog implements."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from longreach.types import Identity, ShardMap


class ContextState(enum.Enum):
    """State of a context (the values are those of the public protocol)."""

    RESERVED = 1
    FILLING = 2
    READY = 3
    UNAVAILABLE = 4
    FAILED = 5


@dataclass(frozen=True, slots=True)
class ContextRecord:
    """A context as the coordinator knows it.

    `tokens` counts tokens, `kv_bytes` bytes of K and V of one copy, `created_at` is in Unix
    seconds, `prefill_s` in seconds and 0 until READY.
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

    @property
    def node_ids(self) -> tuple[str, ...]:
        """Every node that holds a part, in name order."""
        return tuple(sorted({n for shard in self.shard_map.shards for n in shard.node_ids}))


class Catalog(ABC):
    """Durable records of contexts. A write has reached stable storage when its call returns.

    Removal leaves a tombstone, so that a node that was away when a context was deleted does not
    bring it back; storing the context again lifts it, and it may expire after a month.
    """

    @abstractmethod
    async def put(self, record: ContextRecord, token_ids: Sequence[int] | None = None) -> None:
        """Stores a record, replacing an older one; keeps the stored tokens when given none."""

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
    async def close(self) -> None:
        """Releases the storage."""
