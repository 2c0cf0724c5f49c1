"""Clusters of the `kmeans` kind: their members, their sizes, and the tail they estimate."""

from __future__ import annotations

import itertools

import numpy as np

from longreach.attention import partial_attention
from longreach.types import Budget, Span
from retrieval_node.index.base import IndexRows, LayerKv
from retrieval_node.index.clusters import HeadClusters, LayerClusters, cluster_head
from retrieval_node.index.kmeans import KmeansIndex

KEYS = 12_000


def always() -> bool:
    return True


def layer_of(assignments: list[list[int]]) -> LayerClusters:
    clusters = max(max(each) for each in assignments) + 1
    heads = [
        HeadClusters(
            np.array(each, np.int32),
            np.zeros((clusters, 4), np.float32),
            np.zeros((clusters, 4), np.float32),
        )
        for each in assignments
    ]
    return LayerClusters(heads, len(assignments[0]))


def test_sizes_count_only_keys_within_the_scope() -> None:
    layer = layer_of([[0, 1, 1, 2, 0], [2, 2, 2, 0, 1]])
    np.testing.assert_array_equal(layer.sizes_in(Span(1, 4)), [[0, 2, 1], [1, 0, 2]])
    np.testing.assert_array_equal(layer.sizes_in(Span(0, 5)).sum(axis=1), [5, 5])


def test_members_of_chosen_clusters_ascend_within_the_scope() -> None:
    layer = layer_of([[0, 1, 1, 2, 0], [2, 2, 2, 0, 1]])
    chosen = np.zeros((2, 2, 3), bool)
    chosen[0, 0, [0, 1]] = True
    chosen[1, 0, 2] = True
    chosen[1, 1, 2] = True
    offsets, ids = layer.members(chosen, 0, Span(0, 4))
    lists = [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert lists == [[0, 1, 2], [], [3], [0, 1, 2]]


def test_members_of_a_later_head_are_its_own() -> None:
    layer = layer_of([[0, 1, 1, 2, 0], [2, 2, 2, 0, 1]])
    _, ids = layer.members(np.array([[[False, True, False]]]), 1, Span(0, 5))
    assert ids.tolist() == [4]


def test_centroids_are_the_means_of_their_keys_and_values() -> None:
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((1000, 8)).astype(np.float32)
    values = rng.standard_normal((1000, 6)).astype(np.float32)
    clusters = cluster_head(keys, values, 1, always)
    assert clusters is not None
    for cluster in np.unique(clusters.cluster_of)[::7]:
        members = clusters.cluster_of == cluster
        np.testing.assert_allclose(
            clusters.centroids[cluster], keys[members].mean(axis=0), atol=1e-5
        )
        np.testing.assert_allclose(
            clusters.mean_values[cluster], values[members].mean(axis=0), atol=1e-5
        )


def test_the_tail_is_exact_when_the_keys_of_a_cluster_are_equal() -> None:
    rng = np.random.default_rng(1)
    distinct = rng.standard_normal((KEYS // 16, 16)).astype(np.float32)
    keys = np.repeat(distinct, 16, axis=0)[None]
    values = np.repeat(distinct[::-1], 16, axis=0)[None].copy()
    kv = LayerKv(keys, values, 0)
    clusters = LayerClusters(
        [HeadClusters(np.repeat(np.arange(KEYS // 16), 16).astype(np.int32), distinct,
                      distinct[::-1].copy())],
        KEYS,
    )  # fmt: skip
    queries = rng.standard_normal((2, 1, 2, 16)).astype(np.float32)
    rows = IndexRows(queries, 0, Span(100, 11_988), Budget(top_k=20, tail_estimate=True))
    got = KmeansIndex(kv, clusters).attend([rows], 0.25)[0]
    keep = (np.arange(KEYS) >= 100) & (np.arange(KEYS) < 11_988)
    expected = partial_attention(queries.reshape(2, 2, 16), keys, values, 0.25, keep=keep)
    np.testing.assert_allclose(got.partial.lse.reshape(2, 2), expected.lse, atol=1e-3)
    np.testing.assert_allclose(got.partial.output.reshape(2, 2, 16), expected.output, atol=1e-3)
    assert got.work.keys_attended < 2 * 2 * 20 + 1
