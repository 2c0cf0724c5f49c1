"""Kind `roargraph`: the attention-aware graph of RetrievalAttention (arXiv 2409.10516).

Exact nearest keys of sampled prefill queries link keys that the same query needs, so a search that
starts from a query, far outside the keys' own distribution, walks along links that queries made.
The graph is RoarGraph's (PVLDB 17(11), 2024) over centred keys, one per KV head, taught by the
queries of all heads of the group together. Query heads of a group search together: a key read for
one is scored for all.

A search for k keys expands at least k vertices, so the share of keys read falls as contexts grow:
the query heads of a group of four together read about a tenth of 128K keys for recall .95.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from longreach.errors import Cancelled
from longreach.types import BFLOAT16, QuerySample
from retrieval_node.graph_kernel import (
    KeyGraph,
    KeySample,
    LayerGraphs,
    SearchWidth,
    attend_graph,
    build_graph,
)
from retrieval_node.index.base import (
    INDEX_KINDS,
    BuildControl,
    LayerKv,
)
from retrieval_node.index.faiss_kind import centred_keys
from retrieval_node.index.kernel_index import KernelIndex
from retrieval_node.index.roargraph_build import (
    SHAPE,
    exact_neighbours,
    group_queries,
    training_queries,
)
from retrieval_node.kernel import Entry, Results

SEARCH_BEAM = 100
"""Least beam (L) of a search, per query head."""

OVERSEARCH = 2.0
"""Beam per key that the budget asks for: 200 for the usual top 100."""

DEFAULT_WIDTH = SearchWidth(SEARCH_BEAM, OVERSEARCH)

SAMPLE_STRIDE = 64
"""Every how many keys the sample that stands for unread keys has one."""


@INDEX_KINDS.register("roargraph")
class RoarGraphIndex(KernelIndex):
    """One projected bipartite graph per KV head, searched and attended in native code."""

    kind: ClassVar[str] = "roargraph"
    format_version: ClassVar[int] = 1
    stated_recall: ClassVar[float] = 0.9
    """Least recall of the best 64 keys on structured heads, which the shared tests hold it to."""

    def __init__(
        self,
        kv: LayerKv,
        graphs: Sequence[KeyGraph],
        width: SearchWidth = DEFAULT_WIDTH,
    ) -> None:
        # What stands for unread keys are sampled keys with their values.
        super().__init__(kv, summary_bytes=kv.values.shape[2] * kv.values.itemsize)
        self._graphs = LayerGraphs(graphs, len(kv.positions))
        self._sample = KeySample.of(kv.keys, kv.values, SAMPLE_STRIDE)
        self._width = width

    @classmethod
    def build(
        cls, kv: LayerKv, sample: QuerySample | None, control: BuildControl
    ) -> RoarGraphIndex:
        """Learn from `sample`; FailedPrecondition when there is none, Cancelled when stopped."""
        graphs = []
        for head in range(kv.kv_heads):
            graph = build_head(kv, head, sample, control)
            if graph is None:
                raise Cancelled(f"build of roargraph stopped at KV head {head} of {kv.kv_heads}")
            graphs.append(graph)
            control.progress(head + 1, kv.kv_heads)
        return cls(kv, graphs)

    def with_width(self, width: SearchWidth) -> RoarGraphIndex:
        """The same graphs searched with another beam."""
        return RoarGraphIndex(self._kv, self._graphs.graphs, width)

    def attend_entries(
        self, entries: list[Entry], scale: float, softcap: float, want_selected: bool
    ) -> Results:
        """See KernelIndex.attend_entries.

        Rows whose scope costs less to read than to search are read whole inside the call.
        """
        return attend_graph(
            self._kv.keys,
            self._kv.values,
            self._sample,
            self._graphs,
            self._width,
            entries,
            scale,
            softcap,
            want_selected,
        )

    @property
    def index_bytes(self) -> int:
        """Offsets and edges of the graphs, and the sampled keys and values."""
        return self._graphs.nbytes + self._sample.keys.nbytes + self._sample.values.nbytes

    @property
    def graphs(self) -> tuple[KeyGraph, ...]:
        """The graph of each KV head."""
        return self._graphs.graphs

    def arrays(self) -> dict[str, np.ndarray]:
        """The graph of each KV head and where searches enter it."""
        arrays: dict[str, np.ndarray] = {
            "entries": np.array([each.entry for each in self.graphs], np.int64)
        }
        for head, graph in enumerate(self.graphs):
            arrays[f"offsets.{head}"] = graph.offsets
            arrays[f"edges.{head}"] = graph.edges
        return arrays

    @classmethod
    def restore(cls, kv: LayerKv, arrays: Mapping[str, np.ndarray]) -> RoarGraphIndex:
        """See Index.restore; ValueError when a graph points outside the keys."""
        entries = arrays["entries"].tolist()
        if len(entries) != kv.kv_heads:
            raise ValueError(f"graphs of {len(entries)} KV heads for {kv.kv_heads}")
        graphs = [
            KeyGraph(arrays[f"offsets.{head}"], arrays[f"edges.{head}"], entry)
            for head, entry in enumerate(entries)
        ]
        return cls(kv, graphs)


def build_head(
    kv: LayerKv, head: int, sample: QuerySample | None, control: BuildControl
) -> KeyGraph | None:
    """The graph of one KV head; None when the build was cancelled."""
    keys, _ = centred_keys(kv.keys[head])
    if len(keys) == 0:
        return KeyGraph(np.zeros(1, np.int64), np.empty(0, np.int32), 0)

    def proceed() -> bool:
        return not control.cancelled.is_set()

    queries = training_queries(group_queries(sample, kv.kv_heads, head), len(keys))
    neighbours = exact_neighbours(keys, queries, control.threads, proceed)
    if neighbours is None:
        return None
    return build_graph(keys.astype(BFLOAT16), neighbours, SHAPE, control.threads, proceed)
