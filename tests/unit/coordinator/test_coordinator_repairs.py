"""Repairs as tables: members, contexts and holders in, copies, maps and drops out."""

from __future__ import annotations

import dataclasses
import re

import pytest
from coordinator_doubles import FakeNode, model_info

from coordinator.catalog.base import ContextRecord, ContextState
from coordinator.cluster import Cluster, Drain, Heartbeat, Leave, Tick
from coordinator.placement.base import NodeView
from coordinator.repairs import (
    PlacementView,
    lost,
    moves,
    placed,
    remaining,
    repairs,
    revised,
    surplus,
    with_lost_placed,
)
from longreach.errors import ResourceExhausted
from longreach.types import Shard, ShardMap, Span

GRACE_S = 20.0
NOW = 100.0
LIMIT = 1000

# Each story: members ("name[@zone] state-or-silence [used]"), shards of a context of 100 bytes each
# ("id wanted: map nodes | holders"), and what is to be done.
STORIES = {
    "nothing lacks": """
        n0 alive; n1 alive; n2 alive
        s0 2: n0 n1 | n0 n1
        ->
    """,
    "a node that died is waited for, then its shards are copied from their other holders": """
        n0 dead 25; n1 alive; n2 alive
        s0 2: n0 n1 | n1
        ->
        n0 dead 31; n1 alive; n2 alive
        s0 2: n0 n1 | n1
        -> copy s0 n1 -> n2
    """,
    "a silent node still counts": """
        n0 suspect 5; n1 alive; n2 alive
        s0 2: n0 n1 | n0 n1
        ->
    """,
    "a node that came back without a shard gets it again, and nobody else": """
        n0 alive; n1 alive; n2 alive
        s0 2: n0 n1 | n1
        -> copy s0 n1 -> n0
    """,
    "a node whose inventory is not known yet is waited for": """
        n0 unheard; n1 alive; n2 alive
        s0 2: n0 n1 | n1
        ->
    """,
    "a drained node's shards are copied, from it where nobody else has them": """
        n0 draining; n1 alive; n2 alive
        s0 1: n0 | n0
        s1 2: n0 n1 | n0 n1
        -> copy s0 n0 -> n1; copy s1 n1 -> n2
    """,
    "what has the fewest copies comes first": """
        n0 dead 40; n1 alive; n2 alive; n3 alive
        s0 3: n0 n1 n2 | n1 n2
        s1 2: n0 n1 | n1
        -> copy s1 n1 -> n2; copy s0 n1 -> n3
    """,
    "a copy goes to another zone, though it is fuller": """
        n0 dead 40; n1@a alive; n2@a alive; n3@b alive 500
        s0 2: n0 n1 | n1
        -> copy s0 n1 -> n3
    """,
    "a node without room is passed over, and with none nothing is done": """
        n0 dead 40; n1 alive; n2 alive 950; n3 alive 800
        s0 2: n0 n1 | n1
        -> copy s0 n1 -> n3
        n0 dead 40; n1 alive; n2 alive 950
        s0 2: n0 n1 | n1
        ->
    """,
    "what nobody holds cannot be copied": """
        n0 dead 40; n1 alive
        s0 1: n0 |
        ->
    """,
    "a copy that a node outside the map still holds is used, not made": """
        n0 dead 40; n1 alive; n2 alive
        s0 2: n0 n1 | n1 n2
        ->
    """,
}


def world(members: str, shards: list[str]):
    cluster, heard, nodes = Cluster(), set(), []
    for text in members.split(";"):
        name, state, *rest = text.split()
        name, _, zone = name.partition("@")
        number = float(rest[0]) if rest else 0.0
        silent_s = number if state in ("dead", "suspect", "left") else 0.0
        report = Heartbeat(name, 1, f"{name}:1", "", zone, node=FakeNode(name).stats())
        cluster.apply(report, NOW - silent_s)
        if state == "draining":
            cluster.apply(Drain(name), NOW)
        if state == "left":
            cluster.apply(Leave(name, 1), NOW)
        if state != "unheard":
            heard.add(name)
        if state in ("alive", "unheard"):
            nodes.append(NodeView(name, f"{name}:1", 1, LIMIT - int(number), "", zone, LIMIT))
    cluster.apply(Tick(), NOW)
    made, holders, wanted = [], {}, 1
    for text in shards:
        name, count, in_map, holding = re.match(r"(\S+) (\d+): (.*)\|(.*)", text).groups()
        wanted = int(count)
        layer = int(name[1:])
        made.append((wanted, Shard(name, Span(0, 10), (layer,), 0, 1, tuple(in_map.split()))))
        holders[name] = set(holding.split())
    records = [
        ContextRecord(
            f"c{i}", "", model_info().identity, ContextState.READY, 10, 100, 1.0,
            ShardMap((shard,), {n: f"{n}:1" for n in shard.node_ids}, "layer"), replicas=wanted,
        )
        for i, (wanted, shard) in enumerate(made)
    ]  # fmt: skip
    view = PlacementView(
        {m.member_id: m for m in cluster.members()},
        heard,
        tuple(nodes),
        lambda context, shard: holders[shard.shard_id],
        grace_s=GRACE_S,
    )
    return records, view, holders


def stories(text: str):
    """(members, shards, expected) of each part of a story."""
    part: list[str] = []
    for line in (line.strip() for line in text.strip().splitlines()):
        if line.startswith("->"):
            yield part[0], part[1:], line.removeprefix("->").strip()
            part = []
        else:
            part.append(line)


@pytest.mark.parametrize("title", STORIES)
def test_repair_story(title):
    for members, shards, expected in stories(STORIES[title]):
        records, view, _ = world(members, shards)
        told = "; ".join(re.sub(r"c\d+/", "", str(copy)) for copy in repairs(records, view, NOW))
        assert told == expected


def test_a_member_that_never_registered_is_waited_for_after_the_start_only():
    records, view, _ = world("n1 alive; n2 alive", ["s0 2: n0 n1 | n1"])
    assert len(repairs(records, view, NOW)) == 1
    assert repairs(records, dataclasses.replace(view, patient_until=NOW + 1), NOW) == []


REVISIONS = {
    "a node that is gone leaves the map": ("n0 dead 40; n1 alive", "s0 2: n0 n1 | n1", "n1"),
    "one that may come back stays": ("n0 dead 15; n1 alive", "s0 2: n0 n1 | n1", "n0 n1"),
    "a drained node goes once enough others have it": (
        "n0 draining; n1 alive; n2 alive", "s0 2: n0 n1 n2 | n0 n1 n2", "n1 n2",
    ),
    "and not before": ("n0 draining; n1 alive", "s0 2: n0 n1 | n0 n1", "n0 n1"),
    "a copy beyond those wanted goes": (
        "n0 alive; n1 alive; n2 alive", "s0 2: n0 n1 n2 | n0 n1 n2", "n0 n1",
    ),
    "a copy outside the map is taken up": (
        "n0 dead 40; n1 alive; n2 alive", "s0 2: n0 n1 | n1 n2", "n1 n2",
    ),
    "what nobody holds keeps its nodes": ("n0 dead 40; n1 alive", "s0 1: n0 |", "n0"),
}  # fmt: skip


@pytest.mark.parametrize("title", REVISIONS)
def test_map_revision(title):
    members, shard, expected = REVISIONS[title]
    (record,), view, _ = world(members, [shard])
    after = revised(record, view, NOW)
    assert after.shard_map.shards[0].node_ids == tuple(expected.split())
    changed = after.shard_map.shards != record.shard_map.shards
    assert after.shard_map.epoch == record.shard_map.epoch + changed
    assert set(after.shard_map.addresses) == set(expected.split())


def test_a_copy_enters_the_map_under_a_new_epoch_and_a_moved_one_leaves_its_old_node():
    (record,), view, _ = world("n0 alive 900; n1 alive 900; n2 alive", ["s0 2: n0 n1 | n0 n1"])
    (move,) = moves([record], view, NOW)
    assert str(move) == "move c0/s0 n0 -> n2"
    after = placed(record, move, "n2:1")
    assert after.shard_map.shards[0].node_ids == ("n1", "n2")
    assert after.shard_map.addresses == {"n1": "n1:1", "n2": "n2:1"}
    assert after.shard_map.epoch == record.shard_map.epoch + 1


@pytest.mark.parametrize(
    ("members", "shard"),
    [
        ("n0 alive 300; n1 alive 300; n2 alive 200", "s0 2: n0 n1 | n0 n1"),  # nearly even
        ("n0 alive 300; n1 alive 0", "s0 2: n0 n1 | n0 n1"),  # the other one has it
        ("n0@a alive 500; n1@b alive 500; n2@b alive", "s0 2: n0 n1 | n0 n1"),  # same zone
        ("n0 alive 160; n1 alive 0", "s0 1: n0 | n0"),  # it would only swap them
    ],
)
def test_nothing_is_moved_where_that_gains_nothing_or_costs_safety(members, shard):
    records, view, _ = world(members, [shard])
    assert moves(records, view, NOW) == []


def test_what_lies_beside_the_map_is_dropped_only_while_the_map_holds():
    def drops(members: str, text: str):
        (record,), view, holders = world(members, [text])
        shards = record.shard_map.shards
        held = {name: [s for s in shards if name in holders[s.shard_id]] for name in view.members}
        found = surplus([record], view, NOW, lambda node, context: held[node])
        return [(drop.node_id, drop.shard_ids) for drop in found]

    alive = "n0 alive; n1 alive; n2 alive"
    assert drops(alive, "s0 2: n1 n2 | n0 n1 n2") == [("n0", ("s0",))]
    assert drops(alive, "s0 2: n1 n2 | n0 n1") == []
    assert drops("n0 alive; n1 alive; n2 suspect 5", "s0 2: n1 n2 | n0 n1 n2") == []


def test_what_is_left_on_a_node_is_what_maps_place_there_and_it_holds():
    records, _, holders = world(
        "n0 draining; n1 alive", ["s0 2: n0 n1 | n0 n1", "s1 1: n0 |", "s2 1: n1 | n0 n1"]
    )
    left = remaining(records, "n0", lambda context, shard: holders[shard.shard_id])
    assert [(context, shard.shard_id) for context, shard in left] == [("c0", "s0")]


def test_what_nobody_has_or_may_bring_back_is_lost_and_gets_new_nodes_under_a_new_epoch():
    shards = ["s0 2: n0 n1 |", "s1 2: n0 n1 | n1"]
    waiting, view, _ = world("n0 dead 25; n1 alive; n2 alive 100; n3 alive", shards)
    assert lost(waiting, view, NOW) == []
    records, view, _ = world("n0 dead 40; n1 alive 300; n2 alive 100; n3 alive", shards)
    ((record, missing),) = lost(records, view, NOW)
    assert [shard.shard_id for shard in missing] == ["s0"]
    after = with_lost_placed(record, missing, view)
    assert after.shard_map.shards[0].node_ids == ("n3", "n2")
    assert after.shard_map.addresses == {"n2": "n2:1", "n3": "n3:1"}
    assert after.shard_map.epoch == record.shard_map.epoch + 1
    full, view, _ = world("n0 dead 40; n1 alive 950", ["s0 2: n0 n1 |"])
    ((record, missing),) = lost(full, view, NOW)
    with pytest.raises(ResourceExhausted, match="100 bytes"):
        with_lost_placed(record, missing, view)
