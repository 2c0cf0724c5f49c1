"""The native graph kernels, with NumPy arrays in and out (see retrieval_node.kernel)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longreach.types import BFLOAT16, IntArray, StorageArray
from retrieval_node import kernel
from retrieval_node.kernel import Entry, Results

_native: Any = kernel._native  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class KeyGraph:
    """Neighbours of key v of one KV head: edges[offsets[v]:offsets[v + 1]]; searches start at
    `entry`. offsets [n + 1] int64, edges int32."""

    offsets: IntArray
    edges: np.ndarray
    entry: int


@dataclass(frozen=True, slots=True)
class SearchWidth:
    """How far searches go: the least beam, and the beam per key that the budget asks for."""

    beam: int
    oversearch: float


@dataclass(frozen=True, slots=True)
class KeySample:
    """Every `stride`-th key of every head with its value: keys [kv_heads, m, head_dim]."""

    keys: StorageArray
    values: StorageArray
    stride: int

    @classmethod
    def of(cls, keys: StorageArray, values: StorageArray, stride: int) -> KeySample:
        """Copies, so that reading a run of them is sequential."""
        return cls(
            np.ascontiguousarray(keys[:, ::stride]),
            np.ascontiguousarray(values[:, ::stride]),
            stride,
        )


class LayerGraphs:
    """The graphs of all KV heads of a layer over `count` keys, checked once for sound indices.

    Raises ValueError when offsets, edges or entries point outside the graph.
    """

    def __init__(self, graphs: Sequence[KeyGraph], count: int) -> None:
        self.graphs = tuple(graphs)
        self.count = count
        self.native: Any = _native.LayerGraphs(
            [(each.offsets, each.edges, each.entry) for each in graphs], count
        )

    @property
    def nbytes(self) -> int:
        """Bytes of offsets and edges."""
        return sum(each.offsets.nbytes + each.edges.nbytes for each in self.graphs)


@dataclass(frozen=True, slots=True)
class GraphShape:
    """How a graph is built.

    `pivots`: nearest keys of a training query that are linked with the rest of its list. `degree`:
    neighbours kept by each of the two stages. `build_beam`: keys held by the searches that connect
    the graph.
    """

    pivots: int
    degree: int
    build_beam: int


def build_graph(
    keys: StorageArray,
    neighbours: np.ndarray,
    shape: GraphShape,
    threads: int,
    proceed: Callable[[], bool],
) -> KeyGraph | None:
    """RoarGraph over centred bfloat16 keys [n, head_dim].

    `neighbours` [queries, width] int32: nearest keys of each training query, best first, -1 where
    there were fewer. Returns None when `proceed`, called every few thousand keys, returns False.
    The result does not depend on `threads`.
    """
    if keys.dtype != BFLOAT16:
        raise ValueError(f"keys are {keys.dtype}; graphs are built over centred bfloat16 keys")
    built = _native.build_graph(
        keys.view(np.uint16),
        np.ascontiguousarray(neighbours, np.int32),
        shape.pivots,
        shape.degree,
        shape.build_beam,
        threads,
        proceed,
    )
    if not built:
        return None
    offsets, edges, entry = built
    return KeyGraph(offsets, edges, entry)


def attend_graph(
    keys: StorageArray,
    values: StorageArray,
    sample: KeySample,
    graphs: LayerGraphs,
    width: SearchWidth,
    entries: Sequence[Entry],
    scale: float,
    softcap: float = 0.0,
    want_selected: bool = False,
) -> Results:
    """Each entry's budget over the keys that searching the graphs finds; see kernel.attend_scope.

    The query heads of a group search together over one visited set.
    """
    key_bits, value_bits, storage = kernel._storage(keys, values)
    sample_keys, sample_values, _ = kernel._storage(sample.keys, sample.values)
    results: Results = _native.attend_graph(
        key_bits,
        value_bits,
        storage,
        sample_keys,
        sample_values,
        graphs.native,
        entries,
        scale,
        softcap,
        (width.beam, width.oversearch, sample.stride),
        want_selected,
    )
    return results
