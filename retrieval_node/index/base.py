"""What an index over one layer of a sealed shard is.

An index covers every KV head of one layer of a shard. It answers rows of any number of sessions in
one call and returns partial attention, whatever way it chose the keys. A new kind is one file with
a class registered in `INDEX_KINDS`; the shared test matrix then runs it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from longreach.registry import Registry
from longreach.types import (
    Budget,
    FloatArray,
    PartialAttention,
    QuerySample,
    Span,
    StorageArray,
    WorkFigures,
)


@dataclass(frozen=True, slots=True)
class LayerKv:
    """K and V of one layer of a shard.

    keys [kv_heads, n, head_dim], values [kv_heads, n, value_dim], storage dtype, C order;
    `start` is the position of the first key. The arrays are read-only and outlive the index.
    """

    keys: StorageArray
    values: StorageArray
    start: int

    @property
    def kv_heads(self) -> int:
        """KV heads held."""
        return int(self.keys.shape[0])

    @property
    def positions(self) -> Span:
        """Positions held."""
        return Span(self.start, self.start + int(self.keys.shape[1]))

    @property
    def row_bytes(self) -> int:
        """Bytes of one key and one value row of one head."""
        key_bytes = self.keys.shape[2] * self.keys.itemsize
        return int(key_bytes + self.values.shape[2] * self.values.itemsize)


class IndexRows(NamedTuple):
    """Rows that share a scope and a budget.

    queries [rows, heads, group, head_dim] float32 for the KV heads [kv_head_start, kv_head_start +
    heads) of the layer, counted from the shard's first head. `scope` is in positions of the
    context. `logit_floor` [rows, heads, group] or None: absolute logits (after scale and softcap)
    below which keys need not be used.
    """

    queries: FloatArray
    kv_head_start: int
    scope: Span
    budget: Budget
    logit_floor: FloatArray | None = None


class IndexAnswer(NamedTuple):
    """Partial attention of IndexRows: output [rows, heads, group, value_dim], lse [rows, heads,
    group]; `selected`, kept only when asked for, lists the attended positions of each (row, head,
    query head of the group)."""

    partial: PartialAttention
    work: WorkFigures
    search_s: float = 0.0
    attend_s: float = 0.0
    selected: list[list[list[np.ndarray]]] | None = None


@dataclass(frozen=True, slots=True)
class BuildControl:
    """How a build reports and is stopped: `progress(heads_built, heads_total)`; builders check
    `cancelled` at least once a KV head and raise longreach.errors.Cancelled. `threads` bounds the
    CPU threads used."""

    progress: Callable[[int, int], None]
    cancelled: threading.Event
    threads: int = 1


class Index(ABC):
    """Searches and attends one layer of a sealed shard. Thread-safe and immutable once built."""

    kind: ClassVar[str]
    """Registered name."""
    needs_build: ClassVar[bool] = True
    """False for kinds that answer at once, without a build."""
    format_version: ClassVar[int] = 0
    """Version of what `arrays` gives; 0 for kinds that are not kept on disk."""

    @classmethod
    @abstractmethod
    def build(cls, kv: LayerKv, sample: QuerySample | None, control: BuildControl) -> Index:
        """Index over `kv`; `sample` holds prefill queries for attention-aware kinds."""

    @abstractmethod
    def attend(
        self,
        batch: Sequence[IndexRows],
        scale: float,
        softcap: float = 0.0,
        *,
        want_selected: bool = False,
    ) -> list[IndexAnswer]:
        """Partial attention for each entry of the batch, in order.

        Scopes are clipped to the positions held; `keys_in_scope` counts the clipped scope.
        `logits = scale * q·k`, softcapped when `softcap` > 0.
        """

    @property
    @abstractmethod
    def index_bytes(self) -> int:
        """Bytes of the index beside K and V."""

    def arrays(self) -> dict[str, np.ndarray]:
        """What `restore` needs beside K and V; nothing for kinds without a format version."""
        return {}

    @classmethod
    def restore(cls, kv: LayerKv, arrays: Mapping[str, np.ndarray]) -> Index:
        """The index that gave `arrays`, over the same `kv`; for kinds with a format version.

        Raises ValueError or LookupError when the arrays cannot be those of an index over `kv`.
        """
        raise ValueError(f"index kind {cls.kind!r} is not kept on disk; build it again")


INDEX_KINDS: Registry[type[Index]] = Registry("index kind")
"""Every index kind by name."""
