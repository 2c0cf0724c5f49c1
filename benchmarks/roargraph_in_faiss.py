"""Our RoarGraph searched by faiss: its HNSW search over one level that holds our edges.

The same graph under both searches shows what the native search is worth apart from the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import BEAMS, Hnsw, faiss
from benchmarks.scene import Scene
from longreach.types import FloatArray
from retrieval_node.graph_kernel import KeyGraph
from retrieval_node.index.roargraph import RoarGraphIndex


class RoarGraphInFaiss(Hnsw):
    """faiss's IndexHNSWFlat with the neighbours of a built RoarGraph."""

    name = "roargraph in faiss"
    settings = BEAMS

    def __init__(self, scene: Scene, index: RoarGraphIndex, build_cpu_s: float) -> None:
        super().__init__(scene.keys, scene.centred.shape[1])
        self._graph = index.graphs[0]
        self.index = self.build(scene.centred)
        self.build_cpu_s = build_cpu_s
        self._bytes = scene.centred.nbytes + self._graph.offsets.nbytes + self._graph.edges.nbytes

    @property
    def config(self) -> dict[str, Any]:
        """See Peer.config."""
        return {}

    def build(self, keys: FloatArray) -> Any:
        """See Peer.build."""
        offsets, neighbours = ended_neighbours(self._graph)
        count, degree = len(keys), int(np.diff(self._graph.offsets).max(initial=2))
        index = faiss.IndexHNSWFlat(keys.shape[1], -(-degree // 2), faiss.METRIC_INNER_PRODUCT)
        index.storage.add(keys)
        index.ntotal = count
        graph = index.hnsw
        faiss.copy_array_to_vector(np.ones(count, np.int32), graph.levels)
        faiss.copy_array_to_vector(offsets, graph.offsets)
        faiss.copy_array_to_vector(neighbours, graph.neighbors)
        graph.entry_point = self._graph.entry
        graph.max_level = 0
        return index

    def write(self, path: Path) -> None:
        """See Peer.write."""
        faiss.write_index(self.index, str(path))


def ended_neighbours(graph: KeyGraph) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [n + 1] uint64 and neighbours int32, each key's list with a -1 behind it.

    faiss reads up to the largest degree from a key's offset on, or to the first -1. A table of the
    largest degree would be mostly empty: few keys have a hundred times the usual neighbours.
    """
    count = len(graph.offsets) - 1
    neighbours = np.insert(graph.edges, graph.offsets[1:], np.int32(-1))
    offsets = graph.offsets + np.arange(count + 1)
    return offsets.astype(np.uint64), neighbours
