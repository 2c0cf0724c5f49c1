"""Training data of a RoarGraph: which prefill queries teach it, and their exact nearest keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from longreach.errors import FailedPrecondition
from longreach.types import FloatArray, IntArray, QuerySample
from retrieval_node.graph_kernel import GraphShape
from retrieval_node.index.faiss_kind import faiss, faiss_threads

TRAINING_NEIGHBOURS = 100
"""Exact nearest keys of each training query (Nq)."""

SHAPE = GraphShape(pivots=8, degree=24, build_beam=40)
"""RoarGraph's parameters M and L, and how many pivots a query has. The published recipe is 1 pivot,
M 35, L 500. Eight pivots spread what queries know over more keys: recall at equal reads rises, so
that degree and beam, and with them size and build time, can be smaller. A vertex ends with at most
about twice `degree` neighbours."""

QUERY_SHARE = 0.25
"""Training queries of a KV head, all heads of its group together, per key: 6% of the prefill
queries of a group of four. Using all of them would cost O(n^2)."""

TAIL_SHARE = 0.5
"""Part of the training queries taken from the last quarter of the positions: decode queries are
most like the latest prefill queries. The rest are spread over all positions."""

QUERIES_PER_TURN = 1024
"""Queries searched exactly between two checks for cancellation."""


@dataclass(frozen=True, slots=True)
class GroupQueries:
    """Prefill queries of the query heads that share a KV head: [group, m, head_dim], with their
    positions [m], ascending."""

    queries: FloatArray
    positions: IntArray


def group_queries(sample: QuerySample | None, kv_heads: int, head: int) -> GroupQueries:
    """The sampled queries of one KV head; raises FailedPrecondition when there are none."""
    if sample is None or len(sample.positions) == 0:
        raise FailedPrecondition(
            "index kind 'roargraph' learns from prefill queries and the context came with none; "
            "send query samples with the KV, or choose sketch or hnsw",
            reason="NO_QUERY_SAMPLE",
        )
    group = len(sample.queries) // kv_heads
    queries = np.asarray(sample.queries[head * group : (head + 1) * group], np.float32)
    order = np.argsort(sample.positions, kind="stable")
    return GroupQueries(queries[:, order], sample.positions[order])


def training_queries(given: GroupQueries, keys: int) -> FloatArray:
    """The queries [m, head_dim] that teach the graph over `keys` keys.

    Queries of all heads of the group are merged into one set, each as it is: their average is
    near nothing any of them looks for.
    """
    group, held, _ = given.queries.shape
    wanted = min(held, max(1, int(QUERY_SHARE * keys / group)))
    late = np.searchsorted(given.positions, given.positions[-1] * 3 // 4)
    from_tail = _spread(late, held, int(wanted * TAIL_SHARE))
    chosen = np.union1d(from_tail, _spread(0, held, wanted - len(from_tail)))
    return np.ascontiguousarray(given.queries[:, chosen]).reshape(-1, given.queries.shape[2])


def _spread(start: int, stop: int, count: int) -> IntArray:
    """`count` evenly spaced numbers of [start, stop), fewer when there are fewer."""
    count = min(count, stop - start)
    return start + (np.arange(count, dtype=np.int64) * (stop - start)) // max(1, count)


def exact_neighbours(
    keys: FloatArray, queries: FloatArray, threads: int, proceed: Callable[[], bool]
) -> np.ndarray | None:
    """Ids [m, width] int32 of the keys with the highest inner products, best first.

    None when `proceed` returned False between runs of queries.
    """
    width = min(TRAINING_NEIGHBOURS, len(keys))
    found = np.empty((len(queries), width), np.int32)
    with faiss_threads(threads):
        for start in range(0, len(queries), QUERIES_PER_TURN):
            if not proceed():
                return None
            part = slice(start, start + QUERIES_PER_TURN)
            found[part] = faiss.knn(queries[part], keys, width, faiss.METRIC_INNER_PRODUCT)[1]
    return found
