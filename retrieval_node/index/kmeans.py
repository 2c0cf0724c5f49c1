"""Kind `kmeans`: small clusters, the nearest read in full and the others estimated.

As RetroInfer (arXiv 2505.02922): segmented k-means over keys; the clusters whose centroids score
highest are read; with a tail estimate, each cluster's unread keys count as if all had its
centroid's logit and its mean value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import numpy as np

from longreach.attention import merge, softmax_partial
from longreach.errors import Cancelled
from longreach.types import FloatArray, IntArray, PartialAttention, QuerySample
from retrieval_node import kernel
from retrieval_node.index.base import (
    INDEX_KINDS,
    BuildControl,
    Index,
    IndexAnswer,
    IndexRows,
    LayerKv,
)
from retrieval_node.index.clusters import HeadClusters, LayerClusters, cluster_head
from retrieval_node.index.kernel_rows import (
    RowCosts,
    check_rows,
    index_answer,
    kernel_entry,
    local_scope,
    positions_of,
)
from retrieval_node.index.search import Logits, first_width, flat_index

OVERSEARCH = 32
"""Keys read, per query head, for each key that the budget asks for."""

WIDEN = 4
"""Growth of the keys read while a mass or beta rule keeps too many of those read."""

READ_ALL_SHARE = 0.5
"""Share of a scope from which on, instead of clusters, all of it is read."""

SCOPES_REMEMBERED = 16
"""Scopes whose cluster sizes are kept; a session's scope changes every 64 tokens."""


@INDEX_KINDS.register("kmeans")
class KmeansIndex(Index):
    """Clusters of every KV head; one NumPy pass and one kernel call for all heads of an entry."""

    kind: ClassVar[str] = "kmeans"
    format_version: ClassVar[int] = 1
    stated_recall: ClassVar[float] = 0.85
    """Least recall of the best 64 keys on structured heads, which the shared tests hold it to."""

    def __init__(self, kv: LayerKv, clusters: LayerClusters) -> None:
        self._kv = kv
        self._flat = flat_index(kv)
        self._clusters = clusters
        self._sizes = lru_cache(SCOPES_REMEMBERED)(clusters.sizes_in)

    @classmethod
    def build(cls, kv: LayerKv, sample: QuerySample | None, control: BuildControl) -> KmeansIndex:
        """Cluster every KV head in turn; raises Cancelled between segments when asked to stop."""
        heads = []
        for head in range(kv.kv_heads):
            clusters = cluster_head(
                kv.keys[head],
                kv.values[head],
                control.threads,
                lambda: not control.cancelled.is_set(),
            )
            if clusters is None:
                raise Cancelled(f"build of kmeans stopped at KV head {head} of {kv.kv_heads}")
            heads.append(clusters)
            control.progress(head + 1, kv.kv_heads)
        return cls(kv, LayerClusters(heads, len(kv.positions)))

    def attend(
        self,
        batch: Sequence[IndexRows],
        scale: float,
        softcap: float = 0.0,
        *,
        want_selected: bool = False,
    ) -> list[IndexAnswer]:
        """See Index.attend: entries have scopes of their own, so they are taken one at a time."""
        to_logits = Logits(scale, softcap)
        return [self._answer(rows, to_logits, want_selected) for rows in batch]

    @property
    def index_bytes(self) -> int:
        """Centroids and mean values (fp32), and the members of each cluster."""
        return self._clusters.nbytes

    def arrays(self) -> dict[str, np.ndarray]:
        """The cluster of each key, centroids and mean values, all KV heads in each array."""
        return {
            "cluster_of": self._clusters.cluster_of,
            "centroids": self._clusters.centroids,
            "mean_values": self._clusters.mean_values,
        }

    @classmethod
    def restore(cls, kv: LayerKv, arrays: Mapping[str, np.ndarray]) -> KmeansIndex:
        """See Index.restore."""
        parts = (arrays["cluster_of"], arrays["centroids"], arrays["mean_values"])
        cluster_of, centroids, _ = parts
        heads, keys, dim = kv.keys.shape
        clusters = centroids.shape[1] if centroids.ndim == 3 else 0
        expected = ((heads, keys), (heads, clusters, dim), (heads, clusters, kv.values.shape[2]))
        if tuple(each.shape for each in parts) != expected:
            raise ValueError(
                f"clusters have shapes {[each.shape for each in parts]}; expected {expected}"
            )
        if keys and not (cluster_of.min() >= 0 and cluster_of.max() < clusters):
            raise ValueError(f"a key is in none of the {clusters} clusters")
        return cls(
            kv, LayerClusters([HeadClusters(*each) for each in zip(*parts, strict=True)], keys)
        )

    def _answer(self, rows: IndexRows, to_logits: Logits, want_selected: bool) -> IndexAnswer:
        scope = local_scope(rows, self._kv)
        wanted = OVERSEARCH * first_width(rows)
        if rows.budget.exact or wanted > READ_ALL_SHARE * len(scope):
            return self._whole(rows, to_logits, want_selected)
        check_rows(rows, self._kv)
        kv, entry = self._kv, kernel_entry(rows, self._kv)
        logits = self._centroid_logits(rows, to_logits)
        sizes = self._sizes(scope)[rows.kv_head_start : rows.kv_head_start + rows.queries.shape[1]]
        while True:
            candidates = self._clusters.members(
                _nearest(logits, sizes, wanted), rows.kv_head_start, scope
            )
            [figures], [kept] = kernel.attend_candidates(
                kv.keys,
                kv.values,
                [entry],
                [candidates],
                to_logits.scale,
                to_logits.softcap,
                want_selected=True,
            )
            most = max((len(each) for each in kept), default=0)
            if rows.budget.top_k is not None or most * OVERSEARCH <= wanted:
                break
            wanted *= WIDEN
            if wanted > READ_ALL_SHARE * len(scope):
                return self._whole(rows, to_logits, want_selected)
        answer = self._with_centroids_read(rows, index_answer(entry, figures, RowCosts.of(kv)))
        if rows.budget.tail_estimate:
            tail = self._tail(rows, logits, sizes, kept)
            answer = answer._replace(partial=merge([answer.partial, tail]))
        if want_selected:
            answer = answer._replace(selected=positions_of(kept, entry.lse.shape, kv.start))
        return answer

    def _whole(self, rows: IndexRows, to_logits: Logits, want_selected: bool) -> IndexAnswer:
        return self._flat.attend(
            [rows], to_logits.scale, to_logits.softcap, want_selected=want_selected
        )[0]

    def _centroid_logits(self, rows: IndexRows, to_logits: Logits) -> FloatArray:
        """[rows, heads, group, clusters]."""
        heads = rows.queries.shape[1]
        centroids = self._clusters.centroids[rows.kv_head_start : rows.kv_head_start + heads]
        return to_logits.of_scores(rows.queries @ centroids.swapaxes(1, 2))

    def _tail(
        self, rows: IndexRows, logits: FloatArray, sizes: IntArray, kept: list[np.ndarray]
    ) -> PartialAttention:
        """Attention over the keys that were not kept, each standing where its cluster's mean is."""
        _, heads, group, clusters = logits.shape
        pair = np.repeat(np.arange(len(kept)), [len(each) for each in kept])
        head = rows.kv_head_start + pair // group % heads
        cluster = self._clusters.cluster_of[head, np.concatenate(kept)]
        taken = np.bincount(pair * clusters + cluster, minlength=logits.size)
        left = sizes[None, :, None] - taken.reshape(logits.shape)
        with np.errstate(divide="ignore"):
            weighted = logits + np.log(left.astype(np.float32))
        values = self._clusters.mean_values[rows.kv_head_start : rows.kv_head_start + heads]
        return softmax_partial(weighted, values[None])

    def _with_centroids_read(self, rows: IndexRows, answer: IndexAnswer) -> IndexAnswer:
        """The answer with centroids, and the tail's mean values, among the bytes read."""
        pairs = rows.queries.shape[0] * rows.queries.shape[1]
        row_bytes = self._clusters.centroids.shape[2] * 4
        if rows.budget.tail_estimate:
            row_bytes += self._clusters.mean_values.shape[2] * 4
        read = answer.work.bytes_read + pairs * self._clusters.per_head * row_bytes
        return answer._replace(work=replace(answer.work, bytes_read=read))


def _nearest(logits: FloatArray, sizes: IntArray, wanted: int) -> np.ndarray:
    """[rows, heads, clusters] bool: clusters that some query head of the group reads.

    Each query head reads its best clusters until they hold `wanted` keys within the scope.
    """
    count, heads, group, clusters = logits.shape
    masked = np.where(sizes[None, :, None] > 0, logits, -np.inf)
    # Clusters in scope hold a key at least, so the best `wanted` clusters always suffice.
    most = min(wanted, clusters)
    best = np.argpartition(-masked, most - 1, axis=-1)[..., :most] if most < clusters else None
    if best is None:
        best = np.broadcast_to(np.arange(clusters), logits.shape)
    ranked = np.take_along_axis(
        best, np.argsort(-np.take_along_axis(masked, best, -1), axis=-1, kind="stable"), -1
    )
    held = np.take_along_axis(np.broadcast_to(sizes[None, :, None], logits.shape), ranked, -1)
    read = np.cumsum(held, axis=-1) - held < wanted
    chosen = np.zeros((count, heads, group, clusters), bool)
    np.put_along_axis(chosen, ranked, read, axis=-1)
    return np.asarray(chosen.any(axis=2))
