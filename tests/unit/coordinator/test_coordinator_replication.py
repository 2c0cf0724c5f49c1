"""Copies of shards: on distinct nodes, hosts and zones as far as there are some, and in balance."""

from __future__ import annotations

import pytest

from coordinator.placement.base import ClusterView, ContextToPlace, NodeView, bytes_by_node
from coordinator.placement.planner import place
from longreach.types import LayerGeometry, Span

LAYERS = tuple(LayerGeometry(i, 8, 2, 64, 64) for i in range(12))
CONTEXT = ContextToPlace("ctx-a", Span(0, 1000), LAYERS, 2, 1000)
ROOMY = 1 << 40


def view(*places: str, free: int = ROOMY) -> ClusterView:
    """Nodes at "host/zone" places."""
    split = [place.split("/") for place in places]
    return ClusterView(
        tuple(
            NodeView(f"n{i}", f"a{i}:1", 8, free, host, zone)
            for i, (host, zone) in enumerate(split)
        )
    )


@pytest.mark.parametrize("policy", ["layer", "head_group", "round_robin", "auto"])
@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_every_shard_has_its_copies_on_distinct_nodes_and_bytes_are_balanced(policy, nodes):
    shard_map = place(CONTEXT, view(*(f"h{i}/" for i in range(nodes))), policy, replicas=2)
    for shard in shard_map.shards:
        assert len(shard.node_ids) == len(set(shard.node_ids)) == 2
        assert set(shard.node_ids) <= shard_map.addresses.keys()
    stored = bytes_by_node(CONTEXT, shard_map.shards)
    assert sum(stored.values()) == 2 * CONTEXT.room_bytes
    assert max(stored.values()) <= 2 * 2 * CONTEXT.room_bytes / nodes
    assert "2 copies" in shard_map.reason


def test_copies_go_to_another_zone_then_to_another_host():
    places = ("h0/a", "h0/a", "h1/a", "h2/b")
    shard_map = place(CONTEXT, view(*places), "layer", replicas=2)
    zones = {f"n{i}": where.split("/")[1] for i, where in enumerate(places)}
    assert all(len({zones[n] for n in shard.node_ids}) == 2 for shard in shard_map.shards)

    one_zone = place(CONTEXT, view("h0/a", "h0/a", "h1/a"), "layer", replicas=2)
    hosts = {"n0": "h0", "n1": "h0", "n2": "h1"}
    assert all(len({hosts[n] for n in shard.node_ids}) == 2 for shard in one_zone.shards)
    assert "in one zone" in one_zone.reason

    one_host = place(CONTEXT, view("h0/a", "h0/a"), "layer", replicas=2)
    assert all(len(shard.node_ids) == 2 for shard in one_host.shards)
    assert "on one host" in one_host.reason


def test_fewer_copies_are_made_where_nodes_or_room_are_missing_and_the_reason_says_so():
    alone = place(CONTEXT, view("h0/"), "auto", replicas=2)
    assert all(len(shard.node_ids) == 1 for shard in alone.shards)
    assert "2 copies were asked for" in alone.reason
    assert "the cluster has 1 node" in alone.reason

    # Room for one copy and a half.
    tight = view("h0/", "h1/", free=CONTEXT.room_bytes * 3 // 4)
    partial = place(CONTEXT, tight, "round_robin", replicas=2)
    stored = bytes_by_node(CONTEXT, partial.shards)
    assert max(stored.values()) <= CONTEXT.room_bytes * 3 // 4
    assert CONTEXT.room_bytes <= sum(stored.values()) < 2 * CONTEXT.room_bytes
    assert "nodes lack the room" in partial.reason
