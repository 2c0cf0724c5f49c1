"""Every placement policy: each layer, KV head and position exactly once, and balanced."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.placement.base import (
    POLICIES,
    ClusterView,
    ContextToPlace,
    NodeView,
    bytes_by_node,
    check_room,
)
from coordinator.placement.planner import estimate, place, policy_names
from longreach.errors import InvalidRequest, ResourceExhausted, Unavailable
from longreach.types import LayerGeometry, Span

GIB = 1 << 30


def _layers(count, kv_heads=8, sliding=()):
    return tuple(
        LayerGeometry(i, kv_heads * 4, kv_heads, 128, 128, 4096 if i in sliding else 0)
        for i in range(count)
    )


def _context(layers, tokens=1000, name="ctx-a"):
    return ContextToPlace(name, Span(0, tokens), layers, 2, tokens)


def _view(count, cores=16, free=GIB):
    return ClusterView(tuple(NodeView(f"n{i}", f"10.0.0.{i}:1", cores, free) for i in range(count)))


shapes = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 8]), st.sampled_from([64, 128]), st.booleans()),
    min_size=1,
    max_size=24,
)


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from([*POLICIES, "auto"]),
    shape=shapes,
    nodes=st.integers(1, 9),
    tokens=st.integers(0, 5000),
    name=st.text(min_size=1, max_size=8),
)
def test_every_layer_head_and_position_is_placed_exactly_once(policy, shape, nodes, tokens, name):
    layers = tuple(
        LayerGeometry(i, heads * 2, heads, dim, dim, 512 if sliding else 0)
        for i, (heads, dim, sliding) in enumerate(shape)
    )
    context = _context(layers, tokens, name)
    shard_map = place(context, _view(nodes, free=1 << 50), policy)
    cells = defaultdict(list)
    for shard in shard_map.shards:
        for layer in shard.layers:
            for head in range(shard.kv_head_start, shard.kv_head_stop):
                cells[layer, head].append(shard.span)
    assert set(cells) == {(each.layer, head) for each in layers for head in range(each.kv_heads)}
    for spans in cells.values():
        edges = [0, *(edge for span in sorted(spans) for edge in (span.start, span.stop)), tokens]
        assert edges[::2] == edges[1::2]  # each begins where the one before ends
        if policy != "span":
            assert len(spans) == 1
    assert len({shard.shard_id for shard in shard_map.shards}) == len(shard_map.shards)
    by_number = {layer.layer: layer for layer in layers}
    for shard in shard_map.shards:
        geometries = {(by_number[n].head_dim, by_number[n].value_dim) for n in shard.layers}
        assert len(geometries) == 1
        assert set(shard.node_ids) <= shard_map.addresses.keys()
    total = sum(bytes_by_node(context, shard_map.shards).values())
    assert total == context.room_bytes


@pytest.mark.parametrize("layers", [4, 28, 32, 36])
@pytest.mark.parametrize("nodes", [1, 2, 3, 5])
def test_the_layer_policy_balances_layers_within_one(layers, nodes):
    shard_map = POLICIES["layer"](_context(_layers(layers)), _view(nodes))
    held = Counter({f"n{i}": 0 for i in range(nodes)})
    for shard in shard_map.shards:
        assert (shard.kv_head_start, shard.kv_head_stop) == (0, 8)
        held[shard.node_ids[0]] += len(shard.layers)
    assert max(held.values()) - min(held.values()) <= 1


def test_the_layer_policy_balances_searched_layers_apart_from_sliding_ones():
    sliding = {i for i in range(24) if i % 2}
    shard_map = POLICIES["layer"](_context(_layers(24, sliding=sliding)), _view(3))
    searched = Counter(
        shard.node_ids[0] for shard in shard_map.shards for n in shard.layers if n not in sliding
    )
    assert set(searched.values()) == {4}


def test_the_layer_policy_fills_nodes_with_little_room_less():
    context = _context(_layers(8), tokens=1000)
    layer_bytes = context.room_bytes // 8
    nodes = (
        NodeView("big", "a:1", 16, 7 * layer_bytes),
        NodeView("small", "b:1", 16, 2 * layer_bytes),
    )
    shard_map = place(context, ClusterView(nodes), "layer")
    assert bytes_by_node(context, shard_map.shards)["small"] <= 2 * layer_bytes


@pytest.mark.parametrize(("heads", "nodes"), [(8, 3), (8, 8), (2, 5), (1, 4), (6, 4)])
def test_the_head_group_policy_uses_min_of_nodes_and_heads(heads, nodes):
    shard_map = POLICIES["head_group"](_context(_layers(4, kv_heads=heads)), _view(nodes))
    sizes = [shard.kv_heads for shard in shard_map.shards]
    assert len(sizes) == min(heads, nodes)
    assert max(sizes) - min(sizes) <= 1
    assert all(shard.layers == (0, 1, 2, 3) for shard in shard_map.shards)


def test_remainders_of_many_contexts_spread_over_the_nodes():
    load = Counter()
    for i in range(200):
        context = _context(_layers(1), name=f"ctx-{i}")
        load[POLICIES["layer"](context, _view(4)).shards[0].node_ids[0]] += 1
    assert len(load) == 4
    assert min(load.values()) > 25


def test_plans_are_pure():
    for policy in policy_names():
        plans = [place(_context(_layers(12)), _view(3), policy) for _ in range(2)]
        assert plans[0] == plans[1]


def test_auto_keeps_a_layer_on_one_node_when_its_cores_suffice():
    shard_map = place(_context(_layers(32)), _view(4, cores=16))
    assert shard_map.policy == "layer"
    assert "1.00 waves" in shard_map.reason


def test_auto_splits_heads_when_nodes_have_few_cores():
    shard_map = place(_context(_layers(32)), _view(4, cores=2))
    assert shard_map.policy == "head_group"
    assert "4.00 waves of heads" in shard_map.reason  # what `layer` would have cost


def test_auto_does_not_split_heads_between_nodes_of_one_machine():
    apart = [NodeView(f"n{i}", "a:1", 2, GIB, host=f"host-{i}") for i in range(2)]
    together = [NodeView(f"n{i}", "a:1", 2, GIB, host="host") for i in range(2)]
    context = _context(_layers(8))
    assert place(context, ClusterView(tuple(apart))).policy == "head_group"
    assert place(context, ClusterView(tuple(together))).policy == "layer"


def test_the_estimate_counts_waves_messages_and_balance():
    context, view = _context(_layers(5)), _view(2, cores=4)
    by_layer = estimate(context, view, POLICIES["layer"](context, view))
    assert (by_layer.waves, by_layer.messages) == (2.0, 1.0)
    assert by_layer.imbalance == pytest.approx(3 / 2.5)
    by_group = estimate(context, view, POLICIES["head_group"](context, view))
    assert (by_group.waves, by_group.messages, by_group.imbalance) == (1.0, 2.0, 1.0)


def test_what_does_not_fit_is_refused_with_bytes_needed_and_free():
    context = _context(_layers(4), tokens=100_000)
    needed = context.room_bytes
    with pytest.raises(ResourceExhausted) as caught:
        place(context, _view(2, free=GIB // 8))
    assert str(needed) in caught.value.message
    assert str(GIB // 8) in caught.value.message
    assert caught.value.reason == "NODE_MEMORY"


def test_room_for_indexes_is_kept():
    context = _context(_layers(2), tokens=1000)
    view = _view(2, free=context.room_bytes // 2)
    shard_map = place(context, view, "layer")
    with pytest.raises(ResourceExhausted, match="for indexes"):
        check_room(context, shard_map, view, index_reserve=0.25)


def test_a_cluster_without_nodes_says_how_to_get_one():
    with pytest.raises(Unavailable, match="--coordinators"):
        place(_context(_layers(2)), _view(0))


def test_an_unknown_policy_lists_the_known_ones():
    with pytest.raises(InvalidRequest, match="head_group, layer, round_robin"):
        place(_context(_layers(2)), _view(1), "best")


def test_runs_of_positions_are_chosen_where_nothing_else_fits_and_lie_on_one_node_each():
    layers = _layers(2)
    context = _context(layers, tokens=4096)
    # A layer does not fit on a node, nor does half of its heads on each of two.
    nodes = tuple(
        NodeView(f"n{i}", f"a:{i}", 16, int(context.room_bytes * share))
        for i, share in enumerate((0.45, 0.24, 0.2, 0.24))
    )
    view = ClusterView(nodes)
    for name in ("layer", "head_group"):
        with pytest.raises(ResourceExhausted):
            place(context, view, name)
    shard_map = place(context, view)
    assert shard_map.policy == "span"
    assert "no other placement fits" in shard_map.reason
    for node_id, stored in bytes_by_node(context, shard_map.shards).items():
        assert stored <= next(n.free_bytes for n in nodes if n.node_id == node_id)
    assert all(shard.span.start % 128 == 0 for shard in shard_map.shards)

    # With room, a run is on one node whole, so that the node's loss is that of one run.
    roomy = place(context, _view(4), "span")
    assert len(roomy.shards) == len({shard.span for shard in roomy.shards}) == 4
    assert len({shard.node_ids for shard in roomy.shards}) == 4

    with pytest.raises(ResourceExhausted):
        place(context, _view(3, free=context.room_bytes // 4))


def test_a_tail_over_a_context_in_runs_needs_room_where_the_last_run_is():
    context = _context(_layers(2), tokens=4096)
    in_runs = place(context, _view(2), "span")
    tail = ContextToPlace("ctx-a", Span(0, 0), context.layers, 2, 100)
    last = max(in_runs.shards, key=lambda shard: shard.span.stop)
    stored = bytes_by_node(tail, in_runs.shards)
    assert {node for node, size in stored.items() if size} == set(last.node_ids)
    assert sum(stored.values()) == tail.room_bytes
