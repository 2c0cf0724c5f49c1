"""Kind `ivf`: faiss's inverted file, k-means cells of which the nearest are scanned.

A baseline: queries are out of the keys' distribution, so many cells must be scanned
(RetrievalAttention, arXiv 2409.10516, section 2.4).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from longreach.types import FloatArray, IntArray, Span
from retrieval_node.index.base import INDEX_KINDS, LayerKv
from retrieval_node.index.faiss_kind import FaissIndex, faiss
from retrieval_node.index.selection import Reads

KEYS_PER_CELL = 128
"""Average keys in a cell."""

TRAIN_ROWS_PER_CELL = 64
"""Keys the k-means of the cells is trained on, per cell."""

PROBED_SHARE = 0.4
"""Share of the cells scanned for a query: recall of .95 takes 30% to 50% of them."""

SCOPES_REMEMBERED = 16
"""Scopes whose cell sizes are kept for accounting; a session's scope changes every 64 tokens."""


@INDEX_KINDS.register("ivf")
class IvfIndex(FaissIndex):
    """faiss IndexIVFFlat per KV head."""

    kind: ClassVar[str] = "ivf"
    stated_recall: ClassVar[float] = 0.9
    """Least recall of the best 64 keys on structured heads, which the shared tests hold it to."""

    def __init__(self, kv: LayerKv, heads: list[Any], means: list[FloatArray]) -> None:
        super().__init__(kv, heads, means)
        self._cells = [cell_of_keys(each, len(kv.positions)) for each in heads]
        self._cell_sizes = lru_cache(SCOPES_REMEMBERED * max(1, len(heads)))(self._count_cells)

    @classmethod
    def empty_head(cls, keys: FloatArray) -> Any:
        """See FaissIndex.empty_head."""
        dim = keys.shape[1]
        cells = max(1, len(keys) // KEYS_PER_CELL)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.max_points_per_centroid = TRAIN_ROWS_PER_CELL
        index.cp.min_points_per_centroid = 1
        index.cp.niter = 10
        if len(keys):
            index.train(keys)
        return index

    def library_search(
        self, head: int, queries: FloatArray, group: int, width: int, scope: Span
    ) -> tuple[FloatArray, IntArray, Reads]:
        """See FaissIndex.library_search."""
        index = self._heads[head]
        probes = min(index.nlist, max(1, round(index.nlist * PROBED_SHARE)))
        parameters = faiss.SearchParametersIVF(nprobe=probes)
        if len(scope) < len(self._kv.positions):
            parameters.sel = faiss.IDSelectorRange(scope.start, scope.stop, True)
        scores, ids = index.search(queries, width, params=parameters)
        _, cells = index.quantizer.search(queries, probes)
        sizes = self._cell_sizes(head, scope.start, scope.stop)
        by_row = np.arange(len(cells))[:, None] // group * index.nlist + cells
        distinct = sizes[np.unique(by_row) % index.nlist].sum()
        return (
            scores,
            ids,
            Reads(int(distinct), int(sizes[cells].sum()) + cells.shape[0] * index.nlist),
        )

    def _count_cells(self, head: int, start: int, stop: int) -> np.ndarray:
        """Keys of rows [start, stop) in each cell."""
        return np.bincount(self._cells[head][start:stop], minlength=self._heads[head].nlist)

    @property
    def index_bytes(self) -> int:
        """fp32 keys and 64-bit ids in the cells, the cell of each key, and the centroids."""
        dim = int(self._kv.keys.shape[2])
        rows = self._kv.kv_heads * len(self._kv.positions)
        cells = sum(int(index.nlist) for index in self._heads)
        return rows * (dim * 4 + 8 + 4) + cells * dim * 4


def cell_of_keys(index: Any, rows: int) -> np.ndarray:
    """[rows] int32: the cell that holds each key."""
    cells = np.empty(rows, np.int32)
    for cell in range(index.nlist):
        size = index.invlists.list_size(cell)
        if size:
            cells[faiss.rev_swig_ptr(index.invlists.get_ids(cell), size)] = cell
    return cells
