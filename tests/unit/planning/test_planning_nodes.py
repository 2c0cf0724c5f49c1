"""Nodes and placement: the plan's choice is the coordinator's choice."""

from __future__ import annotations

import dataclasses

import pytest

from coordinator.placement import planner
from coordinator.placement.base import ClusterView, ContextToPlace, NodeView, bytes_by_node
from longreach.errors import InvalidRequest
from longreach.planning.memory import node_bytes
from longreach.planning.nodes import MESSAGE_WAVES, plan_nodes
from longreach.planning.shapes import ModelShape, load_shape
from longreach.types import LayerGeometry, Span
from retrieval_node.config import NodeConfig

TOKENS = 1000
GEMMA_LIKE = ModelShape(
    "gemma-like",
    tuple(
        LayerGeometry(n, 8, 4, 64, 64, sliding_window=0 if n % 6 == 5 else 512) for n in range(26)
    ),
    128,
    384,
    1000,
    "bfloat16",
)
SHAPES = [load_shape("llama-3-8b"), load_shape("qwen2.5-7b"), load_shape("llama-2-7b"), GEMMA_LIKE]


def coordinators_view(
    shape: ModelShape, nodes: int, cores: int
) -> tuple[ContextToPlace, ClusterView]:
    context = ContextToPlace("c", Span(0, TOKENS), shape.layers, shape.itemsize, TOKENS)
    view = ClusterView(
        tuple(NodeView(f"n{n}", f"n{n}:1", cores, 1 << 50, host=f"h{n}") for n in range(nodes))
    )
    return context, view


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("cores", [1, 2, 4, 16])
def test_the_plan_places_as_the_coordinator_will(shape: ModelShape, nodes: int, cores: int) -> None:
    context, view = coordinators_view(shape, nodes, cores)
    placed = planner.place(context, view)
    plan = plan_nodes(shape, node_bytes(shape, TOKENS, 1, 0, 0), cores, count=nodes)
    theirs = planner.estimate(context, view, placed)
    assert plan.policy == placed.policy
    assert (plan.waves, plan.messages) == pytest.approx((theirs.waves, theirs.messages))
    fullest = max(bytes_by_node(context, placed.shards).values())
    assert plan.fullest_share == pytest.approx(fullest / context.room_bytes, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("nodes", [1, 2, 3, 5, 8, 11])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_copies_fill_the_nodes_as_the_coordinators_will(
    shape: ModelShape, nodes: int, replicas: int
) -> None:
    """On whichever node a context begins; and with one of them exactly so."""
    first, view = coordinators_view(shape, nodes, 16)
    plan = plan_nodes(shape, node_bytes(shape, TOKENS, 1, 0, 0), 16, count=nodes, replicas=replicas)
    shares = []
    for number in range(4 * nodes):
        context = dataclasses.replace(first, context_id=f"context-{number}")
        placed = planner.place(context, view, replicas=replicas)
        assert plan.copies == min(replicas, nodes) == min(len(s.node_ids) for s in placed.shards)
        held = bytes_by_node(context, placed.shards)
        assert sum(held.values()) == node_bytes(shape, TOKENS, 1, 0, 0, copies=plan.copies).contexts
        shares.append(max(held.values()) / sum(held.values()))
    assert plan.fullest_share == pytest.approx(max(shares), rel=1e-6)


def test_copies_need_as_many_nodes_even_where_one_had_room() -> None:
    shape = load_shape("llama-3-8b")
    one_copy = node_bytes(shape, 1000, 1, 1, 10)
    assert plan_nodes(shape, one_copy, 16, memory_bytes=1 << 40, replicas=2).count == 2


def test_the_price_of_a_message_is_the_coordinators() -> None:
    assert MESSAGE_WAVES == planner.MESSAGE_WAVES


def test_a_planned_node_has_room_for_its_share_and_a_smaller_one_has_not() -> None:
    """32 layers over 3 nodes: the fullest holds 11, of K and V with the index reserve."""
    shape = load_shape("llama-3-8b")
    needed = node_bytes(shape, 10**6, 1, 1, 1024)
    plan = plan_nodes(shape, needed, cores=16, count=3)
    assert plan.memory_bytes == pytest.approx(needed.room * 11 / 32 / 0.8, abs=2)
    limit = NodeConfig(cluster_secret="x", memory_limit_bytes=int(plan.memory_bytes * 0.8))
    assert limit.memory_limit >= needed.room * 11 / 32 - 1


def test_the_fewest_nodes_of_a_size_are_found() -> None:
    shape = load_shape("llama-3-8b")
    needed = node_bytes(shape, 10**6, 1, 1, 1024)
    for memory in (40 << 30, 100 << 30, 200 << 30):
        plan = plan_nodes(shape, needed, 16, memory_bytes=memory)
        assert plan.memory_bytes <= memory
        if plan.count > 1:
            assert plan_nodes(shape, needed, 16, count=plan.count - 1).memory_bytes > memory


def test_nodes_too_small_for_one_layer_are_refused() -> None:
    shape = load_shape("llama-3-8b")
    with pytest.raises(InvalidRequest, match="smallest share needs"):
        plan_nodes(shape, node_bytes(shape, 10**6, 1, 1, 1024), 16, memory_bytes=1 << 30)
    with pytest.raises(InvalidRequest, match="neither"):
        plan_nodes(shape, node_bytes(shape, 1000, 1, 1, 0), 16)
    with pytest.raises(InvalidRequest, match="positive"):
        plan_nodes(shape, node_bytes(shape, 1000, 1, 1, 0), 0, count=1)
