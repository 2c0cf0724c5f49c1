"""Kind `sketch`: scans a short code of every key, then reads in full only the keys that matter.

Per KV head, a query-whitened code of 16, 24 or 32 bytes a key (sketch_fit) is scanned for all query
heads of the group at once; keys above a bar set from a sample are read and scored exactly, the
budget is applied to the exact logits, and the kept values are gathered and summed. The scan is
linear, but in codes a tenth the size of K and V, streamed in order.

With `tail_estimate`, the keys that were not read stand in by their codes' scores, corrected for the
sketch's known error, and by the mean value of their 64 keys: exact top-k alone leaves out mass that
diffuse heads need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from longreach.errors import Cancelled, InvalidRequest
from longreach.types import FloatArray, QuerySample
from retrieval_node import kernel
from retrieval_node.index.base import (
    INDEX_KINDS,
    BuildControl,
    Index,
    IndexAnswer,
    IndexRows,
    LayerKv,
)
from retrieval_node.index.flat import FlatIndex
from retrieval_node.index.kernel_rows import answer_by_budget, index_answer, kernel_rows
from retrieval_node.index.sketch_fit import fit_sketch
from retrieval_node.kernel import SketchCode

SUMMARY_BYTES = 2
"""Bytes of one element of a value summary (bfloat16)."""


@INDEX_KINDS.register("sketch")
class SketchIndex(Index):
    """Query-whitened codes of all keys, an exact second look at a few, an estimate of the rest."""

    kind: ClassVar[str] = "sketch"

    def __init__(self, kv: LayerKv, heads: Sequence[SketchCode]) -> None:
        self._kv = kv
        self._heads = tuple(heads)
        self._flat = FlatIndex(kv)

    @classmethod
    def build(cls, kv: LayerKv, sample: QuerySample | None, control: BuildControl) -> SketchIndex:
        """Fit and encode each KV head; InvalidRequest if a key is NaN or infinite."""
        heads: list[SketchCode] = []
        for head in range(kv.kv_heads):
            if control.cancelled.is_set():
                raise Cancelled(f"sketch build stopped after {head} of {kv.kv_heads} KV heads")
            queries = head_queries(kv, sample, head)
            try:
                heads.append(fit_sketch(kv.keys[head], kv.values[head], queries))
            except ValueError as error:
                raise InvalidRequest(
                    f"KV head {head}: {error}", reason="KEYS_NOT_FINITE"
                ) from error
            control.progress(head + 1, kv.kv_heads)
        return cls(kv, heads)

    def attend(
        self,
        batch: Sequence[IndexRows],
        scale: float,
        softcap: float = 0.0,
        *,
        want_selected: bool = False,
    ) -> list[IndexAnswer]:
        """See Index.attend. Exact budgets are answered by `flat`."""
        return answer_by_budget(
            batch,
            lambda rows: self._flat.attend(rows, scale, softcap, want_selected=want_selected),
            lambda rows: self._search(rows, scale, softcap, want_selected),
        )

    @property
    def index_bytes(self) -> int:
        """Codes, value summaries and models."""
        return sum(head.nbytes for head in self._heads)

    def _search(
        self, batch: Sequence[IndexRows], scale: float, softcap: float, want_selected: bool
    ) -> list[IndexAnswer]:
        kv = self._kv
        answers = kernel.attend_sketch(
            kv.keys,
            kv.values,
            self._heads,
            [kernel_rows(rows, kv) for rows in batch],
            scale,
            softcap,
            want_selected=want_selected,
        )
        summary_bytes = kv.values.shape[2] * SUMMARY_BYTES
        code_bytes = [head.key_bytes for head in self._heads]
        return [
            index_answer(rows, kv, answer, code_bytes, summary_bytes)
            for rows, answer in zip(batch, answers, strict=True)
        ]


def head_queries(kv: LayerKv, sample: QuerySample | None, head: int) -> FloatArray | None:
    """Sampled queries [group, n, d] of the query heads that share KV head `head`."""
    if sample is None or sample.queries.shape[1] == 0:
        return None
    q_heads = sample.queries.shape[0]
    if q_heads % kv.kv_heads or sample.queries.shape[2] != kv.keys.shape[2]:
        raise InvalidRequest(
            f"the query sample has shape {sample.queries.shape}; expected a multiple of "
            f"{kv.kv_heads} query heads with head_dim {kv.keys.shape[2]}"
        )
    group = q_heads // kv.kv_heads
    queries = np.asarray(sample.queries[head * group : (head + 1) * group], np.float32)
    return queries if np.isfinite(queries).all() else None
