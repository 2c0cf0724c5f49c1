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

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from longreach.errors import Cancelled, InvalidRequest
from longreach.types import FloatArray, QuerySample
from retrieval_node import kernel
from retrieval_node.index.base import (
    INDEX_KINDS,
    BuildControl,
    LayerKv,
)
from retrieval_node.index.kernel_index import KernelIndex
from retrieval_node.index.sketch_fit import fit_sketch
from retrieval_node.kernel import Entry, Results, SketchCode, SketchLayer

SUMMARY_BYTES = 2
"""Bytes of one element of a value summary (bfloat16)."""


@INDEX_KINDS.register("sketch")
class SketchIndex(KernelIndex):
    """Query-whitened codes of all keys, an exact second look at a few, an estimate of the rest."""

    kind: ClassVar[str] = "sketch"
    format_version: ClassVar[int] = 1
    """Raise it when codes, summaries or the model of SketchCode change their layout or meaning."""

    def __init__(self, kv: LayerKv, heads: Sequence[SketchCode]) -> None:
        super().__init__(kv, summary_bytes=kv.values.shape[2] * SUMMARY_BYTES)
        self._heads = tuple(heads)
        self._layer = SketchLayer(kv.keys, kv.values, heads)

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

    def attend_entries(
        self, entries: list[Entry], scale: float, softcap: float, want_selected: bool
    ) -> Results:
        """See KernelIndex.attend_entries."""
        return self._layer.attend(entries, scale, softcap, want_selected)

    @property
    def index_bytes(self) -> int:
        """Codes, value summaries and models."""
        return sum(head.nbytes for head in self._heads)

    def arrays(self) -> dict[str, np.ndarray]:
        """Code sizes of every KV head, and its codes, summaries and model."""
        sizes = [(head.eight, head.four) for head in self._heads]
        arrays: dict[str, np.ndarray] = {"sizes": np.array(sizes, np.int64).reshape(-1, 2)}
        for number, head in enumerate(self._heads):
            arrays[f"codes.{number}"] = head.codes
            arrays[f"summaries.{number}"] = head.summaries
            arrays[f"model.{number}"] = head.model
        return arrays

    @classmethod
    def restore(cls, kv: LayerKv, arrays: Mapping[str, np.ndarray]) -> SketchIndex:
        """See Index.restore."""
        sizes = arrays["sizes"].tolist()
        if len(sizes) != kv.kv_heads:
            raise ValueError(f"sketches of {len(sizes)} KV heads for {kv.kv_heads}")
        heads = [
            SketchCode(
                eight, four, arrays[f"codes.{n}"], arrays[f"summaries.{n}"], arrays[f"model.{n}"]
            )
            for n, (eight, four) in enumerate(sizes)
        ]
        for head in heads:
            _check_sizes(head, kv)
        return cls(kv, heads)


def _check_sizes(head: SketchCode, kv: LayerKv) -> None:
    """Raises ValueError unless the arrays have the sizes of a sketch of these keys and values."""
    keys, dim = kv.keys.shape[1:]
    code_dims = 4 * head.eight + 8 * head.four
    expected = {
        "codes": (np.uint8, (-(-keys // kernel.CODE_KEYS) * kernel.CODE_KEYS * head.key_bytes,)),
        "summaries": (np.uint16, (-(-keys // kernel.SUMMARY_KEYS), kv.values.shape[2])),
        "model": (np.float32, ((dim + 1) * dim + 3 * code_dims + dim,)),
    }
    for name, (dtype, shape) in expected.items():
        array = getattr(head, name)
        if (array.dtype, array.shape) != (dtype, shape):
            raise ValueError(
                f"{name} are {array.dtype} {array.shape}; a sketch of {keys} keys has {shape}"
            )


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
