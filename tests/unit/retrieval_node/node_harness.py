"""A store with small random contexts, and the attention it must answer, computed apart from it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from longreach.attention import partial_attention
from longreach.security import Capability, sign
from longreach.types import (
    AppendEntry,
    AttendRows,
    Budget,
    Identity,
    KvBlock,
    LayerGeometry,
    PartialAttention,
    SessionRecord,
    Shard,
    Span,
    storage_dtype,
)
from retrieval_node.builds import Builder
from retrieval_node.memory import MemoryBudget
from retrieval_node.snapshot import Snapshots
from retrieval_node.store import Store

SECRET = b"a secret of the tests"
TENANT = "tenant-digest"
EXACT = Budget(exact=True)
SCALE = 0.25
GEOMETRY = (LayerGeometry(0, 4, 2, 8, 6), LayerGeometry(1, 4, 2, 8, 6))


@dataclass
class Clock:
    """A clock that tests move by hand, starting at the present."""

    now: float = field(default_factory=time.time)

    def __call__(self) -> float:
        return self.now


@dataclass
class Sequence:
    """A token sequence with random K [kv_heads, n, d] and V [kv_heads, n, dv] for each layer."""

    tokens: int
    dtype: str = "float32"
    context_id: str = "ctx-test"
    geometry: tuple[LayerGeometry, ...] = GEOMETRY
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        kind = storage_dtype(self.dtype)
        self.token_ids = rng.integers(0, 1000, self.tokens, dtype=np.int32)
        self.keys = {
            g.layer: rng.normal(size=(g.kv_heads, self.tokens, g.head_dim)).astype(kind)
            for g in self.geometry
        }
        self.values = {
            g.layer: rng.normal(size=(g.kv_heads, self.tokens, g.value_dim)).astype(kind)
            for g in self.geometry
        }

    @property
    def identity(self) -> Identity:
        return Identity("model", "rev", self.dtype, tenant=TENANT)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(g.layer for g in self.geometry)

    def shard(self, start: int = 0, stop: int | None = None, **changes: object) -> Shard:
        stop = self.tokens if stop is None else stop
        heads = self.geometry[0].kv_heads
        values = {
            "shard_id": f"shard-{start}-{stop}",
            "span": Span(start, stop),
            "layers": self.layers,
            "kv_head_start": 0,
            "kv_head_stop": heads,
            "node_ids": ("node",),
        }
        return Shard(**{**values, **changes})  # type: ignore[arg-type]

    def block(
        self, start: int, stop: int, heads: tuple[int, int] = (0, 2), layers: tuple[int, ...] = ()
    ) -> KvBlock:
        chosen = layers or self.layers
        where = (slice(*heads), slice(start, stop))
        return KvBlock(
            chosen,
            heads[0],
            start,
            np.stack([self.keys[layer][where] for layer in chosen]),
            np.stack([self.values[layer][where] for layer in chosen]),
        )

    def entry(
        self, handle: int, start: int, stop: int, epoch: int = 1, heads: tuple[int, int] = (0, 2)
    ) -> AppendEntry:
        ids = tuple(int(t) for t in self.token_ids[start:stop])
        return AppendEntry(handle, epoch, start, ids, (self.block(start, stop, heads),))

    def reference(
        self, layer: int, queries: np.ndarray, span: Span, heads: tuple[int, int] = (0, 2)
    ) -> PartialAttention:
        """Attention of queries [rows, q_heads, d] over the positions of `span`."""
        rows = slice(span.start, span.stop)
        keys, values = (
            self.keys[layer][slice(*heads), rows],
            self.values[layer][slice(*heads), rows],
        )
        return partial_attention(queries, keys, values, SCALE)


def write_capability(context_id: str = "ctx-test", **changes: object) -> bytes:
    values = {"tenant": TENANT, "expires_at": time.time() + 3600, **changes}
    return sign(Capability("write", context_id=context_id, **values), SECRET)  # type: ignore[arg-type]


def read_capability(record: SessionRecord, **changes: object) -> bytes:
    values = {
        "tenant": record.tenant,
        "context_id": record.context_id,
        "expires_at": time.time() + 3600,
        "session_id": record.session_id,
        "epoch": record.epoch,
        **changes,
    }
    return sign(Capability("read", **values), SECRET)  # type: ignore[arg-type]


def session_record(
    context_stop: int, epoch: int = 1, session_id: str = "s1", context_id: str = "ctx-test"
) -> SessionRecord:
    return SessionRecord(session_id, context_id, context_stop, TENANT, epoch)


def make_store(
    limit_bytes: int = 64 << 20,
    kind: str = "flat",
    snapshot_dir: Path | None = None,
    clock: Clock | None = None,
) -> Store:
    memory = MemoryBudget(limit_bytes)
    return Store(
        secret=SECRET,
        memory=memory,
        builder=Builder(memory, kind, 1),
        snapshots=Snapshots(snapshot_dir, kind) if snapshot_dir else None,
        clock=clock or Clock(),
    )


def put(store: Store, sequence: Sequence, shard: Shard) -> int:
    """Puts and seals a shard; returns its checksum."""
    heads = (shard.kv_head_start, shard.kv_head_stop)
    capability = write_capability(sequence.context_id)
    with store.put(
        sequence.context_id, shard, sequence.identity, sequence.geometry, capability
    ) as stream:
        stream.write(sequence.block(shard.span.start, shard.span.stop, heads, shard.layers))
    token_ids = sequence.token_ids[shard.span.start : shard.span.stop]
    return store.seal(sequence.context_id, shard.shard_id, capability, token_ids)[0]


def open_session(
    store: Store,
    sequence: Sequence,
    context_stop: int,
    *,
    epoch: int = 1,
    session_id: str = "s1",
    tail_heads: tuple[int, int] = (0, 2),
) -> tuple[int, int]:
    context_id = sequence.context_id if context_stop else ""
    record = session_record(context_stop, epoch, session_id, context_id)
    tail = sequence.shard(kv_head_start=tail_heads[0], kv_head_stop=tail_heads[1])
    return store.open_session(
        read_capability(record), record, sequence.identity, [tail], sequence.geometry
    )


def rows_for(
    handle: int,
    scope: Span,
    *,
    rows: int = 1,
    heads: tuple[int, int] = (0, 2),
    budget: Budget = EXACT,
    seed: int = 1,
    geometry: LayerGeometry = GEOMETRY[0],
) -> AttendRows:
    rng = np.random.default_rng(seed)
    shape = (rows, (heads[1] - heads[0]) * geometry.group, geometry.head_dim)
    queries = rng.normal(size=shape).astype(np.float32)
    return AttendRows(handle, *heads, scope, budget, queries)
