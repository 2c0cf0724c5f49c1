"""Kind `hnsw`: faiss's hierarchical navigable small world graph (Malkov & Yashunin, 2016).

A baseline: the graph is built from keys alone, so queries, which lie far from the keys they seek,
need long searches in it. Built over centred keys; on raw keys recall falls sharply.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

from longreach.types import FloatArray, IntArray, Span
from retrieval_node.index.base import INDEX_KINDS
from retrieval_node.index.faiss_kind import FaissIndex, faiss
from retrieval_node.index.selection import Reads

DEGREE = 32
"""Neighbours of a vertex (M); 2M on the lowest level."""

BUILD_BEAM = 100
"""efConstruction: candidates kept while a vertex is placed."""

SEARCH_BEAM = 256
"""efSearch: the least number of candidates kept in a search."""

OVERSEARCH = 2.5
"""Candidates kept per key asked for."""

_STATS_LOCK = threading.Lock()
"""faiss counts distance computations in one counter for the whole process, without
synchronisation. Searches of this kind hold this lock so that the figures they report are their
own; a baseline can afford to search one head at a time."""


@INDEX_KINDS.register("hnsw")
class HnswIndex(FaissIndex):
    """faiss IndexHNSWFlat per KV head."""

    kind: ClassVar[str] = "hnsw"
    stated_recall: ClassVar[float] = 0.9
    """Least recall of the best 64 keys on structured heads, which the shared tests hold it to."""

    @classmethod
    def empty_head(cls, keys: FloatArray) -> Any:
        """See FaissIndex.empty_head."""
        index = faiss.IndexHNSWFlat(keys.shape[1], DEGREE, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD_BEAM
        return index

    def narrow(self, scope: Span, width: int) -> bool:
        """The graph is walked outside the scope too, so a search costs more the narrower it is."""
        return super().narrow(scope, width) or self._beam(scope, width) * DEGREE > 2 * len(scope)

    def _beam(self, scope: Span, width: int) -> int:
        """efSearch that keeps enough candidates inside the scope."""
        wanted = max(SEARCH_BEAM, int(OVERSEARCH * width))
        return int(wanted * len(self._kv.positions) / len(scope))

    def library_search(
        self, head: int, queries: FloatArray, group: int, width: int, scope: Span
    ) -> tuple[FloatArray, IntArray, Reads]:
        """See FaissIndex.library_search.

        The library tells how many rows it read, also outside the scope, not which: `distinct` is
        the most that many reads can cover.
        """
        parameters = faiss.SearchParametersHNSW(efSearch=self._beam(scope, width))
        if len(scope) < len(self._kv.positions):
            parameters.sel = faiss.IDSelectorRange(scope.start, scope.stop)
        with _STATS_LOCK:
            before = faiss.cvar.hnsw_stats.ndis
            scores, ids = self._heads[head].search(queries, width, params=parameters)
            reads = int(faiss.cvar.hnsw_stats.ndis - before)
        rows = len(queries) // group
        return scores, ids, Reads(min(reads, rows * len(self._kv.positions)), reads)

    @property
    def index_bytes(self) -> int:
        """The library's fp32 keys and the links of every level."""
        links = sum(
            i.hnsw.neighbors.size() * 4 + i.hnsw.offsets.size() * 8 + i.hnsw.levels.size() * 4
            for i in self._heads
        )
        return int(links) + int(self._kv.keys.size) * 4
