"""Small clusters of keys: segmented k-means, and which keys belong to chosen clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from longreach.types import FloatArray, IntArray, Span, StorageArray
from retrieval_node.index.faiss_kind import centred_keys, faiss, faiss_threads

SEGMENT_KEYS = 8192
"""Keys clustered at a time: neighbours in the text resemble each other, and k-means over a segment
costs little (RetroInfer, arXiv 2505.02922, section 4.2)."""

KEYS_PER_CLUSTER = 16
"""Average keys in a cluster."""

ITERATIONS = 6
"""k-means iterations; more change little at this cluster size."""


@dataclass(frozen=True, slots=True)
class HeadClusters:
    """Clusters of the keys of one KV head.

    cluster_of [n] int32; centroids [c, head_dim] and mean_values [c, value_dim] fp32, the means of
    the keys and of the values of each cluster (0 where a cluster is empty).
    """

    cluster_of: np.ndarray
    centroids: FloatArray
    mean_values: FloatArray


def cluster_head(
    keys: StorageArray, values: StorageArray, threads: int, proceed: Callable[[], bool]
) -> HeadClusters | None:
    """Cluster keys [n, head_dim] with their values; None when `proceed` returned False."""
    cluster_of = np.empty(len(keys), np.int32)
    clusters = 0
    with faiss_threads(threads):
        for start in range(0, len(keys), SEGMENT_KEYS):
            if not proceed():
                return None
            segment = np.asarray(keys[start : start + SEGMENT_KEYS], np.float32)
            wanted = max(1, len(segment) // KEYS_PER_CLUSTER)
            cluster_of[start : start + len(segment)] = clusters + _assign(segment, wanted)
            clusters += wanted
    sizes = np.maximum(1, np.bincount(cluster_of, minlength=clusters))[:, None].astype(np.float32)
    return HeadClusters(
        cluster_of,
        _sums(keys, cluster_of, clusters) / sizes,
        _sums(values, cluster_of, clusters) / sizes,
    )


def _assign(segment: FloatArray, clusters: int) -> np.ndarray:
    """[n] cluster of each key of a segment. Distances do not see a mean that all keys share."""
    centred, _ = centred_keys(segment)
    means = faiss.Kmeans(
        centred.shape[1], clusters, niter=ITERATIONS, seed=1, min_points_per_centroid=1
    )
    means.train(centred)
    return np.asarray(means.index.search(centred, 1)[1][:, 0])


def _sums(rows: StorageArray, cluster_of: np.ndarray, clusters: int) -> FloatArray:
    """[clusters, dim] sum of the rows of each cluster."""
    order = np.argsort(cluster_of, kind="stable")
    sizes = np.bincount(cluster_of, minlength=clusters)
    sums = np.zeros((clusters, rows.shape[1]), np.float32)
    filled = sizes > 0
    starts = (np.cumsum(sizes) - sizes)[filled]
    if len(order):
        sums[filled] = np.add.reduceat(np.asarray(rows[order], np.float32), starts, axis=0)
    return sums


class LayerClusters:
    """Clusters of every KV head of a layer, all heads in one set of arrays.

    Heads have equally many clusters: cluster c of head h is number h * per_head + c.
    """

    def __init__(self, heads: list[HeadClusters], keys: int) -> None:
        self.keys = keys
        self.per_head = len(heads[0].centroids) if heads else 0
        self.centroids = np.stack([head.centroids for head in heads])
        self.mean_values = np.stack([head.mean_values for head in heads])
        self.cluster_of = np.stack([head.cluster_of for head in heads])
        numbered = self.cluster_of + np.arange(len(heads))[:, None] * self.per_head
        order = np.argsort(numbered, axis=None, kind="stable")
        self._members = (order % max(1, keys)).astype(np.int32)
        self._sizes = np.bincount(numbered.reshape(-1), minlength=len(heads) * self.per_head)
        self._starts = np.cumsum(self._sizes) - self._sizes

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.centroids, self.mean_values, self.cluster_of, self._members, self._sizes)
        return sum(array.nbytes for array in arrays) + self._starts.nbytes

    def sizes_in(self, scope: Span) -> IntArray:
        """[kv_heads, clusters] keys of each cluster within the rows of a scope."""
        heads = len(self.cluster_of)
        offsets = np.arange(heads)[:, None] * self.per_head
        numbered = self.cluster_of[:, scope.start : scope.stop] + offsets
        counts = np.bincount(numbered.reshape(-1), minlength=heads * self.per_head)
        return counts.reshape(heads, self.per_head)

    def members(
        self, chosen: np.ndarray, head_start: int, scope: Span
    ) -> tuple[IntArray, np.ndarray]:
        """Keys of chosen clusters within a scope.

        `chosen` [rows, heads, clusters] bool, heads from `head_start` on. Returns offsets [rows *
        heads + 1] and ids int32: those of (row, head) ascend in ids[offsets[i]:offsets[i + 1]].
        """
        rows, heads, _ = chosen.shape
        row, head, cluster = np.nonzero(chosen)
        number = (head + head_start) * self.per_head + cluster
        sizes = self._sizes[number]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ids = self._members[np.repeat(self._starts[number], sizes) + within]
        pair = np.repeat(row * heads + head, sizes)
        inside = (ids >= scope.start) & (ids < scope.stop)
        tagged = np.sort(pair[inside] * self.keys + ids[inside])
        counts = np.bincount(tagged // self.keys, minlength=rows * heads)
        return np.concatenate([[0], np.cumsum(counts)]), (tagged % self.keys).astype(np.int32)
