"""Retrieval without nodes: exact attention over KV kept in this process.

Used by the conformance gate, and by tests as the exact reference of a node tier.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpu_worker.methods.base import Collected, HeadPart, Retrieved, SessionQueries
from longreach.attention import partial_attention
from longreach.types import LayerGeometry, StorageArray, WorkFigures


class InProcessRetriever:
    """Keys and values of every layer by session id, in the storage dtype."""

    def __init__(self, layers: Sequence[LayerGeometry]) -> None:
        self._layers = tuple(layers)
        self._stored: dict[tuple[str, int], tuple[StorageArray, StorageArray]] = {}

    def append(self, session_id: str, layer: int, keys: StorageArray, values: StorageArray) -> None:
        """Stores keys [kv_heads, n, d] and values [kv_heads, n, dv] behind what is stored."""
        held = self._stored.get((session_id, layer))
        if held is not None:
            keys = np.concatenate([held[0], keys], axis=1)
            values = np.concatenate([held[1], values], axis=1)
        self._stored[session_id, layer] = (np.array(keys), np.array(values))

    def stored(self, session_id: str, layer: int) -> tuple[StorageArray, StorageArray]:
        """Keys [kv_heads, n, d] and values of positions from 0."""
        return self._stored[session_id, layer]

    def send(
        self,
        layer: int,
        queries: Sequence[SessionQueries],
        scale: float,
        softcap: float,
        deadline: float,
        traceparent: str = "",
    ) -> _Done:
        """Attends at once."""
        return _Done([self._attend(layer, each, scale, softcap) for each in queries])

    def _attend(self, layer: int, asked: SessionQueries, scale: float, softcap: float) -> Retrieved:
        keys, values = self._stored[asked.session_id, layer]
        scope = slice(asked.scope.start, asked.scope.stop)
        partial = partial_attention(asked.queries, keys[:, scope], values[:, scope], scale, softcap)
        count = len(asked.queries) * keys.shape[0] * len(asked.scope)
        row_bytes = keys.itemsize * (keys.shape[2] + values.shape[2])
        work = WorkFigures(count, count, 0, count, count * row_bytes, count * row_bytes, count)
        return Retrieved([HeadPart(0, partial)], work, {"flat"})


class _Done:
    def __init__(self, answers: list[Retrieved]) -> None:
        self._answers = answers

    def collect(self) -> Collected:
        return Collected(self._answers)
