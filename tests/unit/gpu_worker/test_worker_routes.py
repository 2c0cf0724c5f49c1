"""A shard map becomes pieces that cover every position, layer and head exactly once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.routes import END, plan_route
from longreach.errors import InvalidRequest
from longreach.types import LayerGeometry, Shard, ShardMap, Span

LAYERS = tuple(LayerGeometry(i, 8, 4, 16, 16) for i in range(3))
ALL = (0, 1, 2)


def shard_map(*shards: Shard) -> ShardMap:
    return ShardMap(tuple(shards), {f"n{i}": f"host:{i}" for i in range(4)}, "test")


def shard(
    name: str,
    span: tuple[int, int],
    layers: Sequence[int] = ALL,
    heads: tuple[int, int] = (0, 4),
    nodes: Sequence[str] = ("n0",),
) -> Shard:
    return Shard(name, Span(*span), tuple(layers), *heads, tuple(nodes))


def test_layers_go_to_their_nodes_and_so_does_the_tail() -> None:
    route = plan_route(
        shard_map(shard("a", (0, 100), [0, 2]), shard("b", (0, 100), [1], nodes=["n1"])),
        LAYERS,
        100,
    )
    assert [[p.node_ids for p in pieces] for pieces in route.pieces] == [
        [("n0",)],
        [("n1",)],
        [("n0",)],
    ]
    assert {node: [s.layers for s in tails] for node, tails in route.tail_shards.items()} == {
        "n0": [(0, 2)],
        "n1": [(1,)],
    }
    assert route.addresses == {"n0": "host:0", "n1": "host:1"}


def test_the_last_span_takes_the_tail() -> None:
    route = plan_route(
        shard_map(shard("a", (0, 64), nodes=["n0"]), shard("b", (64, 128), nodes=["n1", "n2"])),
        LAYERS,
        128,
    )
    assert [p.span for p in route.pieces[0]] == [Span(0, 64), Span(64, END)]
    assert set(route.tail_shards) == {"n1", "n2"}


def test_a_session_on_a_prefix_leaves_out_later_spans() -> None:
    route = plan_route(
        shard_map(shard("a", (0, 64)), shard("b", (64, 128), nodes=["n1"])), LAYERS, 40
    )
    assert [p.shard_id for p in route.pieces[0]] == ["a"]
    assert route.pieces[0][0].span == Span(0, END)
    assert set(route.tail_shards) == {"n0"}


def test_a_session_without_a_context_keeps_its_tail_with_the_first_span() -> None:
    route = plan_route(shard_map(shard("a", (0, 0)), shard("b", (0, 0))), LAYERS, 0)
    assert [p.span for p in route.pieces[1]] == [Span(0, END)]


@settings(deadline=None)
@given(
    spans=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    heads=st.sampled_from([[0, 4], [0, 2, 4], [0, 1, 3, 4]]),
    stop=st.integers(0, 200),
)
def test_every_position_and_head_is_served_exactly_once(
    spans: list[int], heads: list[int], stop: int
) -> None:
    edges = [sum(spans[:i]) for i in range(len(spans) + 1)]
    stop = min(stop, edges[-1])
    shards = [
        shard(f"{start}-{head}", (start, end), heads=(head, next_head))
        for start, end in itertools.pairwise(edges)
        for head, next_head in itertools.pairwise(heads)
    ]
    route = plan_route(shard_map(*shards), LAYERS, stop)
    for pieces in route.pieces:
        for head in range(4):
            served = [p.span for p in pieces if p.kv_head_start <= head < p.kv_head_stop]
            assert served[0].start == 0
            assert served[-1].stop == END
            assert all(a.stop == b.start for a, b in itertools.pairwise(served))


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        ([shard("a", (0, 100), [0, 1])], "layer 2"),
        ([shard("a", (0, 100), heads=(0, 2))], "exactly once"),
        ([shard("a", (0, 100), heads=(0, 3)), shard("b", (0, 100), heads=(2, 4))], "exactly once"),
        ([shard("a", (0, 50)), shard("b", (60, 100))], "'b'"),
        ([shard("a", (0, 50))], "exactly once"),
        ([shard("a", (10, 100))], "exactly once"),
        ([shard("a", (0, 100), nodes=["n9"])], "n9"),
    ],
)
def test_a_map_with_holes_or_overlaps_is_refused(shards: list[Shard], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        plan_route(shard_map(*shards), LAYERS, 100)
