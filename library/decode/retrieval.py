"""Retrieval as the nodes do it, in this process: `sink` first and `window` last tokens, and of the
tokens between them what the index kind `index` finds under `budget` (longreach.types.Budget).

RetrievalAttention (arXiv 2409.10516) is `roargraph:top_k=100`, exact nearest neighbours
`flat:top_k=100`. As in a cluster the window begins at a multiple of 64.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import torch

from gpu_worker.arrays import to_array
from gpu_worker.attention import Partial
from library.decode.base import (
    DECODE_METHODS,
    DecodeMethod,
    Found,
    LayerContext,
    Search,
    at_least,
    between,
)
from longreach.errors import InvalidRequest
from longreach.types import Budget, QuerySample, Span, WorkFigures, retrieval_boundary
from retrieval_node import index as _kinds  # noqa: F401  (registers every kind)
from retrieval_node.index.base import INDEX_KINDS, BuildControl, Index, IndexRows, LayerKv


@DECODE_METHODS.register("retrieval")
@dataclass(frozen=True)
class Retrieval(DecodeMethod):
    """Sink, window, and what an index finds between them."""

    index: str = "auto"
    budget: str = "top_k=100"
    sink: int = 128
    window: int = 512

    name = "retrieval"

    def __post_init__(self) -> None:
        at_least(0, sink=self.sink)
        at_least(1, window=self.window)
        INDEX_KINDS[self.index]
        try:
            Budget.parse(self.budget)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None

    def __str__(self) -> str:
        """With the index kind as its name: "sketch:top_k=100,sink=128,window=512"."""
        return f"{self.index}:{self.budget},sink={self.sink},window={self.window}"

    def resident(self, context: int, seen: int) -> list[slice]:
        """Sink and window, and what was fed after the context."""
        first = min(self.sink, seen)
        start = min(max(first, retrieval_boundary(seen, self.window)), max(first, context))
        return [slice(0, first), slice(start, seen)]

    def scope(self, context: int, seen: int) -> Span:
        """The context between them."""
        return between(self.resident(context, seen), context)

    def prepare(self, layer: LayerContext) -> Search | None:
        """Builds the index; methods that differ in budget share it."""
        built = layer.once(("index", self.index), lambda: build_index(self.index, layer))
        return IndexSearch(built, Budget.parse(self.budget), layer)


def build_index(kind: str, layer: LayerContext) -> Index:
    """An index over the layer's whole context, trained on the sampled queries."""
    kv = LayerKv(to_array(layer.keys), to_array(layer.values), 0)
    record = layer.queries
    sample = QuerySample(layer.geometry.layer, 0, record.positions, record.sampled)
    control = BuildControl(progress=lambda built, total: None, cancelled=threading.Event())
    return INDEX_KINDS[kind].build(kv, sample, control)


class IndexSearch(Search):
    """An index of a retrieval node, asked under one budget."""

    def __init__(self, index: Index, budget: Budget, layer: LayerContext) -> None:
        self.kind = index.kind
        self._index = index
        self._budget = budget
        self._layer = layer

    def attend(self, queries: torch.Tensor, scope: Span) -> Found:
        """Attention over what the index finds."""
        geometry, call = self._layer.geometry, self._layer.call
        rows = queries.transpose(0, 1).float().cpu().numpy()
        shaped = rows.reshape(len(rows), geometry.kv_heads, geometry.group, -1)
        asked = IndexRows(np.ascontiguousarray(shaped), 0, scope, self._budget)
        (answer,) = self._index.attend([asked], call.scale, call.softcap)
        output = torch.from_numpy(answer.partial.output).flatten(1, 2).transpose(0, 1)
        lse = torch.from_numpy(answer.partial.lse).flatten(1, 2).transpose(0, 1)
        work = WorkFigures(
            keys_scanned=answer.work.keys_scanned,
            keys_sketched=answer.work.keys_sketched,
            keys_attended=answer.work.keys_attended,
            bytes_read=answer.work.bytes_read,
        )
        return Found(Partial(output.to(queries.device), lse.to(queries.device)), work)
