"""The shards a node holds, by context: filling ones are invisible, sealed ones are served."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from longreach.errors import (
    FailedPrecondition,
    IdentityMismatch,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
)
from longreach.types import Identity, IndexStatus, LayerGeometry, Shard, ShardInventory, Span
from retrieval_node.builds import ShardIndexes
from retrieval_node.filling import FillingShard
from retrieval_node.memory import MemoryBudget, Reservation, Use
from retrieval_node.shard import SealedShard, TokenIds, shard_bytes


@dataclass(slots=True)
class Filling:
    """A shard that is being put; `writers` Put streams are open on it."""

    fill: FillingShard
    reservation: Reservation
    samples_reservation: Reservation
    last_put: float
    writers: int = 0


@dataclass(slots=True, weakref_slot=True)
class Served:
    """A sealed shard with the indexes that answer for it."""

    sealed: SealedShard
    indexes: ShardIndexes
    reservation: Reservation
    snapshot: Path | None = None


@dataclass(slots=True)
class Context:
    """What a node holds of a context. `by_layer` lists the served shards of each layer."""

    context_id: str
    identity: Identity
    filling: dict[str, Filling] = field(default_factory=dict)
    served: dict[str, Served] = field(default_factory=dict)
    by_layer: Mapping[int, tuple[Served, ...]] = field(default_factory=dict)
    geometry: Mapping[int, LayerGeometry] = field(default_factory=dict)

    def shards(self) -> Iterable[Shard]:
        """Every shard, filling or served."""
        yield from (each.fill.shard for each in self.filling.values())
        yield from (each.sealed.shard for each in self.served.values())

    def check_identity(self, identity: Identity) -> None:
        """Raises IdentityMismatch, naming the fields, unless the context's KV is of `identity`."""
        difference = self.identity.difference(identity)
        if difference:
            raise IdentityMismatch(
                f"context {self.context_id!r} holds other KV: {difference}; put a context for "
                "this identity"
            )

    def refresh(self) -> None:
        """Recomputes what is looked up on the token path; replaces, so readers need no lock."""
        by_layer: dict[int, tuple[Served, ...]] = {}
        geometry: dict[int, LayerGeometry] = {}
        for each in self.served.values():
            geometry.update(each.sealed.geometry)
            for layer in each.sealed.shard.layers:
                by_layer[layer] = (*by_layer.get(layer, ()), each)
        self.by_layer, self.geometry = by_layer, geometry


class Contexts:
    """Contexts by id. Thread-safe; nothing slow runs under its lock."""

    def __init__(self, memory: MemoryBudget, index_kind: str, clock: Callable[[], float]) -> None:
        self._memory = memory
        self._index_kind = index_kind
        self._clock = clock
        self._lock = threading.Lock()
        self._contexts: dict[str, Context] = {}

    def get(self, context_id: str) -> Context:
        """The context, with at least one served shard; raises NotFound."""
        context = self._contexts.get(context_id)
        if context is None or not context.served:
            state = "is not sealed yet" if context else "is not on this node"
            raise NotFound(
                f"context {context_id!r} {state}; ask the coordinator where it lives, or put it "
                "again",
                reason="CONTEXT_NOT_FOUND",
            )
        return context

    def begin(
        self,
        context_id: str,
        shard: Shard,
        identity: Identity,
        geometry: Mapping[int, LayerGeometry],
    ) -> Filling | Served:
        """The shard to put into: a new one, one that is filling, or one sealed before.

        Reserves the shard's memory before anything is allocated.
        """
        with self._lock:
            context = self._contexts.get(context_id)
            if context is not None:
                known = _known_shard(context, shard, identity, geometry)
                if isinstance(known, Filling):
                    known.writers += 1
                if known is not None:
                    return known
                _check_disjoint(context, shard)
            filling = self._new_filling(context_id, shard, identity, geometry)
            context = self._contexts.setdefault(context_id, Context(context_id, identity))
            context.filling[shard.shard_id] = filling
            return filling

    def end_put(self, filling: Filling) -> None:
        """Says that a Put stream ended, however it ended."""
        with self._lock:
            filling.writers -= 1
            filling.last_put = self._clock()

    def find(self, context_id: str, shard_id: str) -> Filling | Served:
        """A shard by name; raises NotFound."""
        with self._lock:
            context = self._contexts.get(context_id)
            found: Filling | Served | None = None
            if context is not None:
                found = context.served.get(shard_id) or context.filling.get(shard_id)
            if found is None:
                raise NotFound(
                    f"no shard {shard_id!r} of context {context_id!r} on this node; put it first",
                    reason="SHARD_NOT_FOUND",
                )
            return found

    def check_tokens(self, context_id: str, span: Span, token_ids: TokenIds) -> None:
        """Raises FailedPrecondition when a served shard has other tokens at these positions."""
        with self._lock:
            context = self._contexts.get(context_id)
            served = list(context.served.values()) if context else []
        for each in served:
            each.sealed.check_tokens(span, token_ids)

    def publish(self, filling: Filling, served: Served) -> Served:
        """Makes a shard visible in place of the one that filled; returns the one that is served,
        which is another's when two sealed at once. Raises FailedPrecondition when it was dropped.
        """
        sealed, shard_id = served.sealed, served.sealed.shard.shard_id
        with self._lock:
            context = self._contexts.get(sealed.context_id)
            if context is not None and context.filling.get(shard_id) is filling:
                del context.filling[shard_id]
                self._serve(context, served)
            winner = context.served.get(shard_id) if context else None
            if winner is None:
                raise FailedPrecondition(
                    f"context {sealed.context_id!r} was dropped while shard {shard_id!r} was being "
                    "sealed; put it again",
                    reason="SHARD_DROPPED",
                )
            return winner

    def add_loaded(self, served: Served) -> None:
        """Serves a shard that was read from a snapshot; raises when it does not fit the others."""
        sealed = served.sealed
        with self._lock:
            context = self._contexts.setdefault(
                sealed.context_id, Context(sealed.context_id, sealed.identity)
            )
            context.check_identity(sealed.identity)
            _check_disjoint(context, sealed.shard)
            self._serve(context, served)

    def pop(self, context_id: str) -> Context | None:
        """Takes a context out; the caller frees it."""
        with self._lock:
            return self._contexts.pop(context_id, None)

    def pop_shards(
        self, context_id: str, shard_ids: Collection[str]
    ) -> tuple[list[Filling], list[Served]]:
        """Takes some shards of a context out; the caller frees them."""
        with self._lock:
            context = self._contexts.get(context_id)
            if context is None:
                return [], []
            filling = [context.filling.pop(s) for s in shard_ids if s in context.filling]
            served = [context.served.pop(s) for s in shard_ids if s in context.served]
            context.refresh()
            if not context.filling and not context.served:
                del self._contexts[context_id]
            return filling, served

    def pop_abandoned(self, timeout_s: float) -> list[Filling]:
        """Takes out filling shards that no stream has put into for `timeout_s` seconds."""
        oldest = self._clock() - timeout_s
        abandoned: list[Filling] = []
        with self._lock:
            for context in list(self._contexts.values()):
                for shard_id, each in list(context.filling.items()):
                    if not each.writers and each.last_put < oldest:
                        abandoned.append(context.filling.pop(shard_id))
                if not context.filling and not context.served:
                    del self._contexts[context.context_id]
        return abandoned

    def inventory(self, context_id: str = "") -> list[ShardInventory]:
        """Every shard, or those of one context, by context and shard id."""
        with self._lock:
            contexts = [
                each
                for each in self._contexts.values()
                if not context_id or each.context_id == context_id
            ]
            found = [
                *(
                    _filling_inventory(f, self._index_kind)
                    for c in contexts
                    for f in c.filling.values()
                ),
                *(_served_inventory(s) for c in contexts for s in c.served.values()),
            ]
        return sorted(found, key=lambda each: (each.context_id, each.shard.shard_id))

    def _serve(self, context: Context, served: Served) -> None:
        context.served[served.sealed.shard.shard_id] = served
        context.refresh()

    def _new_filling(
        self,
        context_id: str,
        shard: Shard,
        identity: Identity,
        geometry: Mapping[int, LayerGeometry],
    ) -> Filling:
        reservation = self._memory.reserve(
            Use.CONTEXT,
            shard_bytes(shard, geometry, identity.dtype),
            f"shard {shard.shard_id!r} of context {context_id!r}",
        )
        try:
            fill = FillingShard(context_id, shard, identity, geometry)
        except MemoryError:
            needed = reservation.release()
            raise ResourceExhausted(
                f"the system refused {needed} bytes for shard {shard.shard_id!r}, though the "
                "node's budget allows them; lower --memory-limit-bytes to what the machine has",
                reason="NODE_MEMORY_EXHAUSTED",
            ) from None
        samples = self._memory.reserve(
            Use.INDEX, 0, f"query sample of shard {shard.shard_id!r} of context {context_id!r}"
        )
        return Filling(fill, reservation, samples, self._clock(), writers=1)


def _known_shard(
    context: Context,
    shard: Shard,
    identity: Identity,
    geometry: Mapping[int, LayerGeometry],
) -> Filling | Served | None:
    """The shard of that id, which must be the same shard; None when the id is new."""
    context.check_identity(identity)
    served = context.served.get(shard.shard_id)
    filling = context.filling.get(shard.shard_id)
    known = served.sealed if served else filling.fill if filling else None
    if known is None:
        return None
    if _rectangle(known.shard) != _rectangle(shard) or known.geometry != geometry:
        raise FailedPrecondition(
            f"shard {shard.shard_id!r} of context {context.context_id!r} is on this node with "
            "another span, layers, heads or geometry; drop the context first",
            reason="SHARD_MISMATCH",
        )
    return served or filling


def _rectangle(shard: Shard) -> tuple[Span, tuple[int, ...], int, int]:
    return shard.span, shard.layers, shard.kv_head_start, shard.kv_head_stop


def _check_disjoint(context: Context, shard: Shard) -> None:
    """Two shards of a node never share a position, layer and head: it would be attended twice."""
    for other in context.shards():
        if (
            len(other.span.intersect(shard.span))
            and set(other.layers) & set(shard.layers)
            and max(other.kv_head_start, shard.kv_head_start)
            < min(other.kv_head_stop, shard.kv_head_stop)
        ):
            raise InvalidRequest(
                f"shard {shard.shard_id!r} overlaps shard {other.shard_id!r} of context "
                f"{context.context_id!r} on this node; a position may be held once only",
                reason="SHARD_OVERLAP",
            )


def _filling_inventory(filling: Filling, index_kind: str) -> ShardInventory:
    fill = filling.fill
    return ShardInventory(
        context_id=fill.context_id,
        shard=fill.shard,
        identity=fill.identity,
        sealed=False,
        checksum=0,
        bytes_stored=fill.bytes_written,
        index=IndexStatus("", index_kind, 0, 0, 0),
        snapshotted=False,
    )


def _served_inventory(served: Served) -> ShardInventory:
    sealed = served.sealed
    return ShardInventory(
        context_id=sealed.context_id,
        shard=sealed.shard,
        identity=sealed.identity,
        sealed=True,
        checksum=sealed.checksum,
        bytes_stored=sealed.nbytes,
        index=served.indexes.status(),
        snapshotted=served.snapshot is not None,
    )
