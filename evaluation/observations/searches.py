"""Recall of the best k keys against the share of keys read, for ivf, hnsw and roargraph.

The node's own index kinds are built over centred keys, as nodes build them, and searched one query
at a time with growing effort: cells probed, efSearch, beam. `ivf-raw` and `hnsw-raw` are built over
keys as stored, as a library is used off the shelf: all keys share a large mean, which changes no
ranking but spoils cells and links. A key is read when its full-precision inner product is computed;
ivf's centroids count as keys.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from evaluation.observations.heads import HeadGroup
from longreach.types import Budget, FloatArray, IntArray, QuerySample
from retrieval_node.graph_kernel import SearchWidth
from retrieval_node.index.base import BuildControl, IndexRows, LayerKv
from retrieval_node.index.faiss_kind import centred_keys, faiss, faiss_threads
from retrieval_node.index.hnsw import HnswIndex
from retrieval_node.index.ivf import IvfIndex
from retrieval_node.index.roargraph import RoarGraphIndex

CELL_SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.4, 0.55, 0.75, 1.0)
"""Shares of ivf's cells that are probed."""

BEAMS_PER_KEY = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)
"""Beams of the graphs for each key asked for."""

ENOUGH_RECALL = 0.995
"""No more effort is tried once a search has this recall."""


@dataclass(frozen=True, slots=True)
class Point:
    """One effort: mean recall of the best k and mean share of the keys read for a query."""

    effort: float
    recall: float
    scanned: float


@dataclass(frozen=True, slots=True)
class BaseSet:
    """What is searched: the keys of a head without those held out, which serve as queries.

    centred [n, d] fp32; held_out [m, d] fp32, centred with the same mean.
    """

    kv: LayerKv
    centred: FloatArray
    held_out: FloatArray
    sample: QuerySample
    scale: float


class Searcher(ABC):
    """An index over a base set, searched with an effort to choose."""

    name: ClassVar[str]
    efforts: ClassVar[Sequence[float]] = BEAMS_PER_KEY

    @abstractmethod
    def __init__(self, base: BaseSet) -> None:
        """Builds the index, on the calling thread."""

    @staticmethod
    def keys_of(base: BaseSet) -> FloatArray:
        """The keys to index [n, d] fp32."""
        return base.centred

    @abstractmethod
    def search(self, queries: FloatArray, k: int, effort: float) -> tuple[IntArray, float]:
        """Ids [q, k] of queries [q, d] (-1: none found), and the keys read for all of them."""


class IvfSearcher(Searcher):
    """k-means cells of which the nearest are scanned; effort: share of the cells."""

    name = "ivf"
    efforts = CELL_SHARES

    def __init__(self, base: BaseSet) -> None:
        with faiss_threads(1):
            keys = self.keys_of(base)
            self._index = IvfIndex.empty_head(keys)
            self._index.add(keys)
        cells = range(self._index.nlist)
        self._sizes = np.array([self._index.invlists.list_size(cell) for cell in cells])

    def search(self, queries: FloatArray, k: int, effort: float) -> tuple[IntArray, float]:
        """See Searcher.search."""
        cells = int(self._index.nlist)
        probes = min(cells, max(1, round(cells * effort)))
        with faiss_threads(1):
            parameters = faiss.SearchParametersIVF(nprobe=probes)
            ids = self._index.search(queries, k, params=parameters)[1]
            probed = self._index.quantizer.search(queries, probes)[1]
        return ids, float(self._sizes[probed].sum() + cells * len(queries))


class HnswSearcher(Searcher):
    """A graph over keys alone; effort: efSearch for each key asked for."""

    name = "hnsw"

    def __init__(self, base: BaseSet) -> None:
        with faiss_threads(1):
            keys = self.keys_of(base)
            self._index = HnswIndex.empty_head(keys)
            self._index.add(keys)

    def search(self, queries: FloatArray, k: int, effort: float) -> tuple[IntArray, float]:
        """See Searcher.search; faiss counts distances in one counter for the whole process."""
        with faiss_threads(1):
            parameters = faiss.SearchParametersHNSW(efSearch=max(1, round(effort * k)))
            before = faiss.cvar.hnsw_stats.ndis
            ids = self._index.search(queries, k, params=parameters)[1]
            return ids, float(faiss.cvar.hnsw_stats.ndis - before)


class RawIvfSearcher(IvfSearcher):
    """The same cells over keys as stored."""

    name = "ivf-raw"

    @staticmethod
    def keys_of(base: BaseSet) -> FloatArray:
        """See Searcher.keys_of."""
        return np.asarray(base.kv.keys[0], np.float32)


class RawHnswSearcher(HnswSearcher):
    """The same graph over keys as stored."""

    name = "hnsw-raw"

    @staticmethod
    def keys_of(base: BaseSet) -> FloatArray:
        """See Searcher.keys_of."""
        return np.asarray(base.kv.keys[0], np.float32)


class RoarGraphSearcher(Searcher):
    """The attention-aware graph, taught by prefill queries; effort: beam for each key asked for."""

    name = "roargraph"

    def __init__(self, base: BaseSet) -> None:
        control = BuildControl(lambda built, total: None, threading.Event())
        self._index = RoarGraphIndex.build(base.kv, base.sample, control)
        self._scope = base.kv.positions
        self._scale = base.scale

    def search(self, queries: FloatArray, k: int, effort: float) -> tuple[IntArray, float]:
        """See Searcher.search. Each query is a row of its own, so none profits from another."""
        wide = self._index.with_width(SearchWidth(max(1, round(effort * k)), 1.0))
        rows = IndexRows(
            np.ascontiguousarray(queries[:, None, None]), 0, self._scope, Budget(top_k=k)
        )
        answer = wide.attend([rows], self._scale, want_selected=True)[0]
        ids = np.full((len(queries), k), -1, np.int64)
        for query, lists in enumerate(answer.selected or ()):
            found = lists[0][0]
            ids[query, : len(found)] = found
        return ids, float(answer.work.keys_scanned)


SEARCHERS: tuple[type[Searcher], ...] = (
    RawIvfSearcher,
    RawHnswSearcher,
    IvfSearcher,
    HnswSearcher,
    RoarGraphSearcher,
)


def base_set(head: HeadGroup, held_out: int, seed: int = 0) -> BaseSet:
    """A head's keys without `held_out` random ones."""
    chosen = np.random.default_rng(seed).choice(len(head.keys), held_out, replace=False)
    kept = np.ones(len(head.keys), bool)
    kept[chosen] = False
    keys, values = head.keys[kept], head.values[kept]
    centred, mean = centred_keys(keys)
    held = np.asarray(head.keys[np.sort(chosen)], np.float32) - mean
    sample = QuerySample(0, 0, head.prefill_positions, head.prefill_queries)
    return BaseSet(LayerKv(keys[None], values[None], 0), centred, held, sample, head.scale)


def exact_best(base: BaseSet, queries: FloatArray, k: int) -> IntArray:
    """Ids [q, k] of the keys with the highest inner products."""
    with faiss_threads(1):
        found = faiss.knn(queries, base.centred, k, faiss.METRIC_INNER_PRODUCT)[1]
    return np.asarray(found, np.int64)


def curve(searcher: Searcher, keys: int, queries: FloatArray, truth: IntArray) -> list[Point]:
    """Recall and share of the `keys` read with growing effort, up to ENOUGH_RECALL.

    queries [q, d]; truth [q, k] from `exact_best`.
    """
    points: list[Point] = []
    for effort in searcher.efforts:
        ids, read = searcher.search(queries, truth.shape[1], effort)
        points.append(Point(effort, recall(ids, truth), read / (len(queries) * keys)))
        if points[-1].recall >= ENOUGH_RECALL:
            break
    return points


def recall(ids: IntArray, truth: IntArray) -> float:
    """Mean share of the true ids of each query [q, k] that are among those found [q, width]."""
    hits = [np.isin(true, found).mean() for found, true in zip(ids, truth, strict=True)]
    return float(np.mean(hits))


def scanned_at(points: Sequence[Point], wanted: float) -> float:
    """Share of the keys read at a recall, interpolated between the two efforts around it.

    Searches that never reach it read every key: 1.
    """
    before: Point | None = None
    for point in points:
        if point.recall >= wanted:
            if before is None:
                return point.scanned
            part = (wanted - before.recall) / (point.recall - before.recall)
            return before.scanned + part * (point.scanned - before.scanned)
        before = point
    return 1.0
