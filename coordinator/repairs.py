"""Which copies of shards to make, to move and to give up: decided from the records, the members and
what they hold. Pure; `repairing` carries it out.

A node is HERE, or AWAY for a while (silent, restarting, or declared dead less than the grace ago:
it may come back with what its disk has), or LEAVING (it answers and is to be emptied), or GONE.
Copies on nodes that are HERE count; those AWAY count too, until the grace has passed.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from coordinator.catalog.base import ContextRecord, ContextState
from coordinator.cluster import DEAD_AFTER_S, Member, MemberState
from coordinator.holdings import rectangle
from coordinator.placement.base import NodeView
from coordinator.placement.replication import closeness, next_holder
from longreach.errors import ResourceExhausted
from longreach.types import Shard, ShardMap

UNBALANCED = 0.15
"""Nodes whose shares of used memory differ by less are left as they are."""


class Standing(enum.Enum):
    """How far a node is counted on for what it holds."""

    HERE = "here"
    AWAY = "away"
    LEAVING = "leaving"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy to make: from a node that holds the shard to one that should. `moved_from` is the node
    that gives its own up afterwards, where the copy does not add to their number."""

    context_id: str
    shard: Shard
    source: str
    target: str
    moved_from: str = ""

    def __str__(self) -> str:
        verb = "move" if self.moved_from else "copy"
        return f"{verb} {self.context_id}/{self.shard.shard_id} {self.source} -> {self.target}"


@dataclass(frozen=True, slots=True)
class Drop:
    """Shards of a context to drop from a node."""

    node_id: str
    context_id: str
    shard_ids: tuple[str, ...]


Holders = Callable[[str, Shard], Collection[str]]
"""`holders(context_id, shard)`: the nodes that are known to hold a sealed copy."""


@dataclass(frozen=True, slots=True)
class PlacementView:
    """What repairs are decided from.

    `members` by name; `heard` are nodes whose inventory is known; `nodes` may take new KV, with
    what is free of it and of their limit; `holders(context, shard)` hold a shard. Until
    `patient_until` (the clock of `now`) nodes that never registered may still come. `grace_s` is
    how long a node that is dead or took leave may take to come back. `busy` are (context, shard)
    that are being copied.
    """

    members: Mapping[str, Member]
    heard: Collection[str]
    nodes: tuple[NodeView, ...]
    holders: Holders
    patient_until: float = 0.0
    grace_s: float = 0.0
    busy: Collection[tuple[str, str]] = ()

    def standing(self, node_id: str, now: float) -> Standing:
        """How far a node is counted on."""
        member = self.members.get(node_id)
        if member is None:
            return Standing.AWAY if now < self.patient_until else Standing.GONE
        silent_s = now - member.seen_at
        if member.state is MemberState.DEAD:
            back_by = DEAD_AFTER_S + self.grace_s
            return Standing.AWAY if silent_s < back_by else Standing.GONE
        if member.state is MemberState.LEAVING:
            return Standing.AWAY if silent_s < self.grace_s else Standing.GONE
        if member.state is MemberState.SUSPECT or node_id not in self.heard:
            return Standing.AWAY
        return Standing.LEAVING if member.draining else Standing.HERE


@dataclass(frozen=True, slots=True)
class _Copies:
    """The nodes of a shard, sorted by what they are worth: those of the map that are away or have
    lost it, and all that hold it, those of the map first."""

    here: tuple[str, ...]
    leaving: tuple[str, ...]
    away: tuple[str, ...]
    emptied: tuple[str, ...]

    @property
    def counted(self) -> int:
        return len(self.here) + len(self.away)


def _copies(record: ContextRecord, shard: Shard, view: PlacementView, now: float) -> _Copies:
    holders = view.holders(record.context_id, shard)
    held = [n for n in shard.node_ids if n in holders]
    held += sorted(n for n in holders if n not in held)
    standing = {n: view.standing(n, now) for n in (*shard.node_ids, *held)}
    return _Copies(
        here=tuple(n for n in held if standing[n] is Standing.HERE),
        leaving=tuple(n for n in held if standing[n] is Standing.LEAVING),
        away=tuple(n for n in shard.node_ids if standing[n] is Standing.AWAY),
        emptied=tuple(n for n in shard.node_ids if standing[n] is Standing.HERE and n not in held),
    )


def repairs(records: Iterable[ContextRecord], view: PlacementView, now: float) -> list[Copy]:
    """Copies that bring shards back to the number wanted, those with the fewest first.

    A node that should hold a shard and has lost it comes before others; else the node that shares
    least with the other holders. A shard that nobody holds cannot be copied.
    """
    free = {node.node_id: node.free_bytes for node in view.nodes}
    load = {node.node_id: -node.free_bytes for node in view.nodes}
    wanted: list[tuple[int, Copy]] = []
    for record, shard in _shards(records, view):
        copies = _copies(record, shard, view, now)
        source = next(iter((*copies.here, *copies.leaving)), None)
        if source is None or copies.counted >= record.replicas:
            continue
        size = shard_bytes(record, shard)
        target = next((n for n in copies.emptied if free.get(n, 0) >= size), None)
        if target is None:
            keeping = dataclasses.replace(
                shard, node_ids=(*copies.here, *copies.away, *copies.leaving, *copies.emptied)
            )
            found = next_holder(keeping, view.nodes, free, size, load)
            target = found.node_id if found else None
        if target is None:
            continue
        free[target] -= size
        load[target] += size
        wanted.append((copies.counted, Copy(record.context_id, shard, source, target)))
    return [copy for _, copy in sorted(wanted, key=lambda each: each[0])]


def lost(
    records: Iterable[ContextRecord], view: PlacementView, now: float
) -> list[tuple[ContextRecord, tuple[Shard, ...]]]:
    """Contexts with shards that no node has any more, nor may bring back, and these shards."""
    found: dict[str, tuple[ContextRecord, list[Shard]]] = {}
    for record, shard in _shards(records, view):
        copies = _copies(record, shard, view, now)
        if not (copies.here or copies.leaving or copies.away):
            found.setdefault(record.context_id, (record, []))[1].append(shard)
    return [(record, tuple(shards)) for record, shards in found.values()]


def with_lost_placed(
    record: ContextRecord, shards: Collection[Shard], view: PlacementView
) -> ContextRecord:
    """The record with new nodes for lost shards, as many as copies are wanted and there is room
    for; raises ResourceExhausted where a shard fits nowhere."""
    free = {node.node_id: node.free_bytes for node in view.nodes}
    load = {node.node_id: -node.free_bytes for node in view.nodes}
    names = {shard.shard_id for shard in shards}
    placed_shards = []
    for shard in record.shard_map.shards:
        if shard.shard_id not in names:
            placed_shards.append(shard)
            continue
        size = shard_bytes(record, shard)
        holding = dataclasses.replace(shard, node_ids=())
        for _ in range(record.replicas):
            target = next_holder(holding, view.nodes, free, size, load)
            if target is None:
                break
            holding = dataclasses.replace(holding, node_ids=(*holding.node_ids, target.node_id))
            free[target.node_id] -= size
            load[target.node_id] += size
        if not holding.node_ids:
            raise ResourceExhausted(
                f"shard {shard.shard_id!r} of context {record.context_id} needs {size} bytes and "
                f"the roomiest node has {max(free.values(), default=0)} free; add nodes or delete "
                "contexts",
                reason="NODE_MEMORY",
            )
        placed_shards.append(holding)
    addresses = {node.node_id: node.address for node in view.nodes}
    changed = with_shards(record, placed_shards, addresses)
    if changed is record:  # on the same nodes as before, yet a new placement
        shard_map = dataclasses.replace(record.shard_map, epoch=record.shard_map.epoch + 1)
        changed = dataclasses.replace(record, shard_map=shard_map)
    return changed


def moves(records: Iterable[ContextRecord], view: PlacementView, now: float) -> list[Copy]:
    """At most one move that evens out the nodes' memory: a shard from the fullest node to the
    emptiest, where that leaves both nearer to each other and no copies nearer together."""
    nodes = [n for n in view.nodes if view.standing(n.node_id, now) is Standing.HERE]
    if len(nodes) < 2:
        return []
    fullest = max(nodes, key=lambda node: node.used_share)
    emptiest = min(nodes, key=lambda node: node.used_share)
    if fullest.used_share - emptiest.used_share < UNBALANCED:
        return []
    by_name = {node.node_id: node for node in nodes}
    best: tuple[int, Copy] | None = None
    for record, shard in _shards(records, view):
        copies = _copies(record, shard, view, now)
        size = shard_bytes(record, shard)
        others = [by_name[n] for n in copies.here if n != fullest.node_id]
        if (
            fullest.node_id not in copies.here
            or emptiest.node_id in shard.node_ids
            or copies.counted < record.replicas
            or emptiest.free_bytes < size
            or emptiest.share_with(size) > fullest.share_with(-size)
            or closeness(emptiest, others) > closeness(fullest, others)
        ):
            continue
        if best is None or size > best[0]:
            move = Copy(
                record.context_id, shard, fullest.node_id, emptiest.node_id, fullest.node_id
            )
            best = (size, move)
    return [best[1]] if best else []


def revised(record: ContextRecord, view: PlacementView, now: float) -> ContextRecord:
    """The record with map entries as the nodes are: without nodes that are gone where other copies
    are here, without those that are leaving or in excess where enough others are, and with nodes
    that hold a copy which is wanted.
    """
    shards = []
    for shard in record.shard_map.shards:
        copies = _copies(record, shard, view, now)
        if not (copies.here or copies.leaving):
            # What nobody holds keeps its nodes: they are named to whoever asks what to bring back.
            shards.append(shard)
            continue
        if len(copies.here) >= record.replicas:
            keep = copies.here[: record.replicas]
        else:
            kept = {*copies.here, *copies.away, *copies.emptied, *copies.leaving}
            keep = tuple(n for n in shard.node_ids if n in kept)
            keep += tuple(n for n in copies.here if n not in keep)
        shards.append(dataclasses.replace(shard, node_ids=keep))
    addresses = {name: member.report.address for name, member in view.members.items()}
    return with_shards(record, shards, addresses)


def placed(record: ContextRecord, copy: Copy, address: str) -> ContextRecord:
    """The record once a copy is sealed: its target serves, and a moved copy's old node does not."""
    shards = [
        dataclasses.replace(
            shard,
            node_ids=tuple(
                dict.fromkeys(n for n in (*shard.node_ids, copy.target) if n != copy.moved_from)
            ),
        )
        if shard.shard_id == copy.shard.shard_id
        else shard
        for shard in record.shard_map.shards
    ]
    return with_shards(record, shards, {copy.target: address})


def with_shards(
    record: ContextRecord, shards: Iterable[Shard], addresses: Mapping[str, str] | None = None
) -> ContextRecord:
    """The record with other nodes for its shards, under a new placement epoch; the same record
    where nothing changed."""
    kept = tuple(shards)
    old = record.shard_map
    if kept == old.shards:
        return record
    used = {node_id for shard in kept for node_id in shard.node_ids}
    known = old.addresses | dict(addresses or {})
    shard_map: ShardMap = dataclasses.replace(
        old,
        shards=kept,
        addresses={name: at for name, at in known.items() if name in used},
        epoch=old.epoch + 1,
    )
    return dataclasses.replace(record, shard_map=shard_map)


def surplus(
    records: Iterable[ContextRecord],
    view: PlacementView,
    now: float,
    sealed_on: Callable[[str, str], Collection[Shard]],
) -> list[Drop]:
    """What nodes hold of stored contexts beside the map, where the map's own nodes hold enough.

    `sealed_on(node, context)` are the shards that a node holds, under any map.
    """
    drops = []
    for record in records:
        if record.state is not ContextState.READY:
            continue
        shards = record.shard_map.shards
        enough = all(
            len([n for n in _copies(record, s, view, now).here if n in s.node_ids])
            >= min(record.replicas, len(s.node_ids))
            for s in shards
        )
        if not enough:
            continue
        for node_id in sorted(view.heard):
            placed_here = {rectangle(s) for s in shards if node_id in s.node_ids}
            extra = [
                s.shard_id
                for s in sealed_on(node_id, record.context_id)
                if rectangle(s) not in placed_here
                and (record.context_id, s.shard_id) not in view.busy
            ]
            if extra:
                drops.append(Drop(node_id, record.context_id, tuple(sorted(extra))))
    return drops


def remaining(
    records: Iterable[ContextRecord], node_id: str, holders: Holders
) -> list[tuple[str, Shard]]:
    """What the maps still place on a node that is to be emptied, and that it holds."""
    return [
        (record.context_id, shard)
        for record in records
        for shard in record.shard_map.shards
        if node_id in shard.node_ids and node_id in holders(record.context_id, shard)
    ]


def shard_bytes(record: ContextRecord, shard: Shard) -> int:
    """About how many bytes of K and V a shard has: its part of the context's cells."""

    def cells(each: Shard) -> int:
        return len(each.span) * len(each.layers) * each.kv_heads

    total = sum(cells(each) for each in record.shard_map.shards)
    return record.kv_bytes * cells(shard) // max(1, total)


def _shards(
    records: Iterable[ContextRecord], view: PlacementView
) -> Iterable[tuple[ContextRecord, Shard]]:
    """Shards of stored contexts that nothing is being done to."""
    for record in records:
        if record.state in (ContextState.READY, ContextState.UNAVAILABLE):
            for shard in record.shard_map.shards:
                if (record.context_id, shard.shard_id) not in view.busy:
                    yield record, shard
