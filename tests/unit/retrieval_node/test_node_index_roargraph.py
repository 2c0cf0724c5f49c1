"""RoarGraph: what its build promises, and what its files survive."""

from __future__ import annotations

import threading
from functools import cache

import numpy as np
import pytest

from benchmarks.synthetic import Workload, workload
from longreach.errors import FailedPrecondition
from longreach.types import BFLOAT16, QuerySample
from retrieval_node.graph_kernel import GraphShape, KeyGraph, LayerGraphs, build_graph
from retrieval_node.index.base import BuildControl, LayerKv
from retrieval_node.index.faiss_kind import centred_keys
from retrieval_node.index.roargraph import RoarGraphIndex, build_head
from retrieval_node.index.roargraph_build import (
    GroupQueries,
    exact_neighbours,
    group_queries,
    training_queries,
)

KEYS = 6000
SHAPE = GraphShape(pivots=4, degree=16, build_beam=48)


def always() -> bool:
    return True


@cache
def head() -> Workload:
    return workload(KEYS, head_dim=32, group=2, steps=32, prefill=1024, seed=3)


def layer_kv() -> LayerKv:
    return LayerKv(head().keys[None], head().values[None], 0)


def sample() -> QuerySample:
    return QuerySample(0, 0, head().prefill_positions, head().prefill_queries)


def control() -> BuildControl:
    return BuildControl(lambda built, total: None, threading.Event())


@cache
def neighbours() -> np.ndarray:
    keys, _ = centred_keys(head().keys)
    queries = training_queries(group_queries(sample(), 1, 0), KEYS)
    found = exact_neighbours(keys, queries, 1, always)
    assert found is not None
    return found


def graph(threads: int = 1, lists: np.ndarray | None = None) -> KeyGraph:
    keys, _ = centred_keys(head().keys)
    lists = neighbours() if lists is None else lists
    built = build_graph(keys.astype(BFLOAT16), lists, SHAPE, threads, always)
    assert built is not None
    return built


@cache
def index() -> RoarGraphIndex:
    return RoarGraphIndex.build(layer_kv(), sample(), control())


def reachable(built: KeyGraph) -> np.ndarray:
    seen = np.zeros(len(built.offsets) - 1, bool)
    seen[built.entry] = True
    front = np.array([built.entry])
    while len(front):
        edges = [built.edges[built.offsets[v] : built.offsets[v + 1]] for v in front]
        found = np.unique(np.concatenate(edges))
        front = found[~seen[found]]
        seen[front] = True
    return seen


def test_every_key_can_be_reached_from_the_entry() -> None:
    assert reachable(graph()).all()


def test_no_key_is_its_own_neighbour_or_has_one_twice() -> None:
    built = graph()
    for v in range(KEYS):
        own = built.edges[built.offsets[v] : built.offsets[v + 1]]
        assert v not in own
        assert len(np.unique(own)) == len(own)


def test_edges_to_the_first_key_are_no_more_common_than_to_any_other() -> None:
    """Lists padded with zeros would make key 0 a neighbour of most keys."""
    incoming = np.bincount(graph().edges, minlength=KEYS)
    assert incoming[0] <= np.percentile(incoming, 99)


def test_the_number_of_threads_does_not_change_the_graph() -> None:
    one, three = graph(threads=1), graph(threads=3)
    np.testing.assert_array_equal(one.offsets, three.offsets)
    np.testing.assert_array_equal(one.edges, three.edges)
    assert one.entry == three.entry


def test_a_mean_that_all_keys_share_does_not_change_what_is_found() -> None:
    """Keys are centred before the inner-product occlusion rule sees them."""
    mean = np.zeros(32, np.float32)
    mean[3] = 64.0
    shifted = np.asarray(head().keys, np.float32) + mean
    plain, moved = (
        build_head(LayerKv(keys[None], keys[None], 0), 0, sample(), control())
        for keys in (shifted - mean, shifted)
    )
    assert plain is not None
    assert moved is not None
    same = np.isin(_pairs(plain), _pairs(moved)).mean()
    assert same > 0.9


def _pairs(built: KeyGraph) -> np.ndarray:
    keys = np.repeat(np.arange(KEYS), np.diff(built.offsets))
    return keys * KEYS + built.edges


@pytest.mark.parametrize(
    "lists",
    [
        np.empty((0, 5), np.int32),
        np.full((3, 5), -1, np.int32),
        np.array([[7, -1, -1], [9, 9, 9], [0, 5, -1]], np.int32),
        np.array([[7], [8]], np.int32),
    ],
    ids=["no queries", "no neighbours", "short and repeated", "pivots alone"],
)
def test_short_neighbour_lists_still_give_a_connected_graph(lists: np.ndarray) -> None:
    assert reachable(graph(lists=lists)).all()


def test_keys_that_few_queries_reach_do_not_all_hang_on_the_same() -> None:
    taught_by_few = graph(lists=neighbours()[:20])
    assert reachable(taught_by_few).all()
    assert np.diff(taught_by_few.offsets).max() <= 3 * SHAPE.degree


def test_queries_of_all_heads_are_merged_not_averaged() -> None:
    queries = np.arange(2 * 40 * 4, dtype=np.float32).reshape(2, 40, 4)
    chosen = training_queries(GroupQueries(queries, np.arange(40)), keys=80)
    rows = queries.reshape(-1, 4)
    assert all((rows == each).all(axis=1).any() for each in chosen)
    assert {0, 1} == {int(each[0] // 160) for each in chosen}


def test_training_queries_favour_the_last_quarter_but_cover_all_positions() -> None:
    positions = np.arange(1000)
    queries = positions.astype(np.float32)[None, :, None]
    chosen = training_queries(GroupQueries(queries, positions), keys=800)[:, 0]
    assert len(chosen) <= 200
    assert (chosen >= 750).mean() > 0.5
    assert (chosen < 250).sum() > 10


def test_a_context_without_query_samples_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="query samples"):
        RoarGraphIndex.build(layer_kv(), None, control())


@pytest.mark.parametrize(
    ("offsets", "edges", "entry"),
    [
        ([0, 1, 2, 4], [1, 2, 0, 3], 0),
        ([0, 1, 2, 4], [1, 2, 0, -1], 0),
        ([0, 2, 1, 4], [1, 2, 0, 1], 0),
        ([0, 1, 2, 5], [1, 2, 0, 1], 0),
        ([0, 1, 4], [1, 2, 0, 1], 0),
        ([0, 1, 2, 4], [1, 2, 0, 1], 3),
    ],
    ids=["edge too high", "negative edge", "descending", "too long", "too few", "entry"],
)
def test_graphs_that_point_outside_their_keys_are_refused(
    offsets: list[int], edges: list[int], entry: int
) -> None:
    built = KeyGraph(np.array(offsets, np.int64), np.array(edges, np.int32), entry)
    with pytest.raises(ValueError, match="graph"):
        LayerGraphs([built], 3)
