"""Which sealed shards the nodes hold, and what follows for the contexts.

Pure: nodes' inventories come in, states, leftovers and rebuilt records come out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

from coordinator.catalog.base import ContextRecord, ContextState
from longreach.steps import ModelInfo
from longreach.types import Identity, Shard, ShardInventory, ShardMap, Span


def without_tenant(identity: Identity) -> Identity:
    """The identity as workers know it: they serve every tenant."""
    return dataclasses.replace(identity, tenant="")


def rectangle(shard: Shard) -> Shard:
    """The shard without its nodes, to compare a plan with what a node reports."""
    return dataclasses.replace(shard, node_ids=())


class Holdings:
    """Sealed shards by node and context, from inventories and finished prefills."""

    def __init__(self) -> None:
        self._nodes: dict[str, dict[str, list[ShardInventory]]] = {}
        self._prefilled: dict[str, dict[str, set[Shard]]] = {}

    def report(self, node_id: str, inventory: Sequence[ShardInventory]) -> None:
        """Replaces what the node reported before by its inventory.

        What a prefill sealed there stays: the inventory may have been taken before that.
        """
        held: dict[str, list[ShardInventory]] = {}
        self._nodes[node_id] = held
        for item in inventory:
            if item.sealed:
                held.setdefault(item.context_id, []).append(item)

    def learn(self, node_id: str, context_id: str, inventory: Sequence[ShardInventory]) -> None:
        """Replaces what the node reported about one context."""
        sealed = [item for item in inventory if item.sealed]
        self._nodes.setdefault(node_id, {})[context_id] = sealed

    def heard(self, node_id: str) -> bool:
        """Whether the node's inventory is known."""
        return node_id in self._nodes

    def lost(self, node_id: str) -> None:
        """The node is gone, or lost its memory."""
        self._nodes.pop(node_id, None)
        self._prefilled.pop(node_id, None)

    def sealed(self, record: ContextRecord) -> None:
        """A prefill ended: every shard of the map is sealed."""
        for shard in record.shard_map.shards:
            for node_id in shard.node_ids:
                by_context = self._prefilled.setdefault(node_id, {})
                by_context.setdefault(record.context_id, set()).add(rectangle(shard))

    def dropped(self, context_id: str) -> None:
        """The context was dropped everywhere."""
        for reported in self._nodes.values():
            reported.pop(context_id, None)
        for prefilled in self._prefilled.values():
            prefilled.pop(context_id, None)

    def holds(self, node_id: str, context_id: str, shard: Shard) -> bool:
        """Whether a node holds a sealed copy of a shard."""
        wanted = rectangle(shard)
        if wanted in self._prefilled.get(node_id, {}).get(context_id, ()):
            return True
        reported = self._nodes.get(node_id, {}).get(context_id, ())
        return any(rectangle(item.shard) == wanted for item in reported)

    def missing(self, record: ContextRecord) -> list[Shard]:
        """Shards of a context that no node holds."""
        return [
            shard
            for shard in record.shard_map.shards
            if not any(self.holds(n, record.context_id, shard) for n in shard.node_ids)
        ]

    def nodes(self) -> frozenset[str]:
        """The nodes whose inventory is known."""
        return frozenset(self._nodes)

    def holders(self, context_id: str, shard: Shard) -> list[str]:
        """Every node that is known to hold a sealed copy of a shard, in name order."""
        names = sorted(self._nodes.keys() | self._prefilled.keys())
        return [name for name in names if self.holds(name, context_id, shard)]

    def sealed_on(self, node_id: str, context_id: str) -> list[Shard]:
        """The sealed shards of a context that a node holds, under whatever map."""
        reported = self._nodes.get(node_id, {}).get(context_id, ())
        found = {rectangle(item.shard) for item in reported}
        return sorted(
            found | self._prefilled.get(node_id, {}).get(context_id, set()),
            key=lambda shard: shard.shard_id,
        )

    def copied(self, node_id: str, context_id: str, shard: Shard) -> None:
        """A node holds a sealed copy since now."""
        by_context = self._prefilled.setdefault(node_id, {})
        by_context.setdefault(context_id, set()).add(rectangle(shard))

    def gave_up(self, node_id: str, context_id: str, shard_ids: Collection[str]) -> None:
        """A node dropped some shards of a context."""
        reported = self._nodes.get(node_id, {})
        if context_id in reported:
            reported[context_id] = [
                item for item in reported[context_id] if item.shard.shard_id not in shard_ids
            ]
        prefilled = self._prefilled.get(node_id, {})
        if context_id in prefilled:
            prefilled[context_id] = {
                shard for shard in prefilled[context_id] if shard.shard_id not in shard_ids
            }

    def copies(self, record: ContextRecord, shard: Shard) -> list[str]:
        """The nodes of a shard's map entry that hold it, in the map's order."""
        return [n for n in shard.node_ids if self.holds(n, record.context_id, shard)]

    def under_replicated(self, record: ContextRecord) -> list[Shard]:
        """Shards of which fewer copies are known than are wanted."""
        return [
            shard
            for shard in record.shard_map.shards
            if len(self.copies(record, shard)) < record.replicas
        ]

    def unknown(self, known: Collection[str]) -> dict[str, dict[str, list[ShardInventory]]]:
        """Inventories, by context and node, of contexts that are not among the known ones."""
        found: dict[str, dict[str, list[ShardInventory]]] = {}
        for node_id, by_context in self._nodes.items():
            for context_id, items in by_context.items():
                if context_id not in known:
                    found.setdefault(context_id, {})[node_id] = items
        return found


def settled(record: ContextRecord, missing: Sequence[Shard]) -> ContextRecord:
    """The record in the state that the nodes justify; one that failed stays failed."""
    if record.state is ContextState.FAILED:
        return record
    if not missing:
        return dataclasses.replace(record, state=ContextState.READY, prefill_fraction=1.0, error="")
    nodes = sorted({node_id for shard in missing for node_id in shard.node_ids})
    return dataclasses.replace(
        record,
        state=ContextState.UNAVAILABLE,
        error=f"{len(missing)} of {len(record.shard_map.shards)} shards are out of reach; they "
        f"were on {', '.join(nodes)}: bring these nodes back, or create the context again",
    )


def interrupted(record: ContextRecord) -> ContextRecord:
    """The record as a restarted coordinator takes it over: what was being stored has failed."""
    if record.state not in (ContextState.RESERVED, ContextState.FILLING):
        return record
    return dataclasses.replace(
        record,
        state=ContextState.FAILED,
        error="the coordinator ended while the context was being stored; create it again",
    )


def leftovers(
    inventory: Iterable[ShardInventory],
    records: Mapping[str, ContextRecord],
    tombstones: Collection[str],
) -> dict[str, str]:
    """Contexts that a node should drop (id to tenant): deleted and failed ones, and those whose
    prefill was interrupted. Contexts being filled are the caller's concern; shards of stored ones
    that the map does not put there are for repairs to use or drop."""
    found: dict[str, str] = {}
    for item in inventory:
        record = records.get(item.context_id)
        if record is None:
            useless = not item.sealed or item.context_id in tombstones
        elif record.filling:
            useless = False  # its owner is at work
        else:
            useless = record.state is ContextState.FAILED
        if useless:
            found[item.context_id] = item.identity.tenant
    return found


def rebuild(
    context_id: str,
    by_node: Mapping[str, Sequence[ShardInventory]],
    addresses: Mapping[str, str],
    models: Iterable[ModelInfo],
    now: float,
    replicas: int = 1,
) -> ContextRecord | None:
    """The record of a context that only the nodes remember; None until it is whole.

    As many copies are wanted as there were when it was stored, and `replicas` at least: those that
    are known now may be fewer only because a node has not registered yet.

    It is whole when its shards cover every layer and KV head of the model over [0, n). Its name
    and tokens are not known to the nodes' inventories and stay empty.
    """
    items = [item for held in by_node.values() for item in held]
    identity = items[0].identity
    model = next((m for m in models if m.identity == without_tenant(identity)), None)
    if model is None or any(item.identity != identity for item in items):
        return None
    holders: dict[Shard, list[str]] = {}
    sizes: dict[Shard, int] = {}
    for node_id in sorted(by_node):
        for item in by_node[node_id]:
            holders.setdefault(rectangle(item.shard), []).append(node_id)
            sizes[rectangle(item.shard)] = item.bytes_stored
    if not _covers(holders, model):
        return None
    shards = tuple(
        dataclasses.replace(shard, node_ids=tuple(holders[shard]))
        for shard in sorted(holders, key=lambda shard: shard.shard_id)
    )
    return ContextRecord(
        context_id=context_id,
        name="",
        identity=identity,
        state=ContextState.READY,
        tokens=max(shard.span.stop for shard in shards),
        kv_bytes=sum(sizes.values()),
        created_at=now,
        shard_map=ShardMap(shards, dict(addresses), "rebuilt", "found on the nodes"),
        prefill_fraction=1.0,
        replicas=max(replicas, *(len(item.shard.node_ids) for item in items)),
    )


def _covers(shards: Collection[Shard], model: ModelInfo) -> bool:
    """Whether the shards are the model's layers and heads over [0, n), each exactly once."""
    spans: dict[tuple[int, int], list[Span]] = {}
    for shard in shards:
        for number in shard.layers:
            for head in range(shard.kv_head_start, shard.kv_head_stop):
                spans.setdefault((number, head), []).append(shard.span)
    wanted = {(each.layer, head) for each in model.layers for head in range(each.kv_heads)}
    stop = max((shard.span.stop for shard in shards), default=0)
    return spans.keys() == wanted and all(_tiles(each, stop) for each in spans.values())


def _tiles(spans: Iterable[Span], stop: int) -> bool:
    """Whether spans follow each other from 0 to `stop`."""
    reached = 0
    for span in sorted(spans):
        if span.start != reached:
            return False
        reached = span.stop
    return reached == stop
