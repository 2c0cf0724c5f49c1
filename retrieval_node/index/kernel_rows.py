"""Between the rows of an index and the rows of the native kernels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from longreach.errors import InvalidRequest
from longreach.types import FloatArray, IntArray, PartialAttention, Span, WorkFigures
from retrieval_node.index.base import IndexAnswer, IndexRows, LayerKv
from retrieval_node.kernel import Entry, Figures, KernelRows, entry


def local_scope(rows: IndexRows, kv: LayerKv) -> Span:
    """The scope clipped to the positions held, counted from the first key held."""
    return Span(*local_bounds(rows.scope, kv))


def local_bounds(scope: Span, kv: LayerKv) -> tuple[int, int]:
    """`local_scope` as plain numbers, for the token path; (0, 0) when nothing is in scope."""
    start = max(0, scope.start - kv.start)
    stop = min(kv.keys.shape[1], scope.stop - kv.start)
    return (start, stop) if start < stop else (0, 0)


class RowCosts(NamedTuple):
    """Bytes read with a key row, with a value row, and with a value summary of a tail estimate."""

    key: int
    value: int
    summary: int = 0

    @classmethod
    def of(cls, kv: LayerKv, summary: int = 0) -> RowCosts:
        """Those of a layer's K and V."""
        keys, values = kv.keys, kv.values
        return cls(keys.shape[2] * keys.itemsize, values.shape[2] * values.itemsize, summary)


def explain_refusal(batch: Iterable[IndexRows], kv: LayerKv) -> None:
    """Raise InvalidRequest if it is for their shapes, NaN or infinity that the kernel refused these
    rows."""
    for rows in batch:
        check_rows(rows, kv)


def kernel_rows(rows: IndexRows, kv: LayerKv) -> KernelRows:
    """The same rows, in keys counted from the first held. The kernel checks shapes and numbers."""
    queries, kv_head_start, scope, budget, floor = rows
    start, stop = local_bounds(scope, kv)
    return KernelRows(queries, kv_head_start, start, stop, budget, floor)


def kernel_entry(rows: IndexRows, kv: LayerKv) -> Entry:
    """The same rows with a budget and room for their answer. Called for each on the token path."""
    queries, kv_head_start, scope, budget, floor = rows
    start, stop = local_bounds(scope, kv)
    return entry(queries, kv_head_start, start, stop, budget, floor, kv.values.shape[2])


def check_rows(rows: IndexRows, kv: LayerKv) -> None:
    """Raise InvalidRequest unless queries and logit floor fit the keys and queries are finite."""
    check_shapes(rows, kv)
    check_finite(rows)


def check_shapes(rows: IndexRows, kv: LayerKv) -> None:
    """Raise InvalidRequest unless queries and logit floor fit the keys."""
    shape = rows.queries.shape
    if len(shape) != 4 or shape[3] != kv.keys.shape[2]:
        raise InvalidRequest(
            f"queries have shape {shape}; expected [rows, heads, group, {kv.keys.shape[2]}]"
        )
    stop = rows.kv_head_start + shape[1]
    if rows.kv_head_start < 0 or stop > kv.kv_heads:
        raise InvalidRequest(
            f"KV heads [{rows.kv_head_start}, {stop}) are not all among the {kv.kv_heads} held"
        )
    check_floor(rows)


def check_floor(rows: IndexRows) -> None:
    """Raise InvalidRequest unless there is no logit floor or it fits the queries."""
    floor, shape = rows.logit_floor, rows.queries.shape[:3]
    if floor is not None and floor.shape != shape:
        raise InvalidRequest(
            f"logit_floor has shape {floor.shape}; expected {shape} as the queries"
        )


def check_finite(rows: IndexRows) -> None:
    """Raise InvalidRequest if a query holds NaN or infinity."""
    # A sum is the quicker look; finite numbers may overflow it, hence the second.
    if not math.isfinite(rows.queries.sum()) and not np.isfinite(rows.queries).all():
        raise InvalidRequest("queries hold NaN or infinity; send finite values")


def index_answer(entry: Entry, figures: Figures, costs: RowCosts) -> IndexAnswer:
    """The kernel's answer with its figures as work."""
    scanned, sketched, attended, tail_rows, code_bytes, search_ns, attend_ns = figures
    key, value, summary = costs
    _, _, start, stop, output, lse, _, _ = entry
    count, heads, _ = lse.shape
    pairs = count * heads * (stop - start)
    read = scanned * key + attended * value + tail_rows * summary + code_bytes
    return IndexAnswer(
        PartialAttention(output, lse),
        WorkFigures(pairs, scanned, sketched, attended, read, pairs * (key + value), pairs),
        search_ns * 1e-9,
        attend_ns * 1e-9,
    )


def positions_of(
    selected: Iterable[np.ndarray], shape: Sequence[int], first: int
) -> list[list[list[IntArray]]]:
    """`selected` of an answer from the kernel's lists of keys for [rows, heads, group]; `first` is
    the position of the first key."""
    rows, heads, group = shape
    lists = iter(selected)
    return [
        [[next(lists).astype(np.int64) + first for _ in range(group)] for _ in range(heads)]
        for _ in range(rows)
    ]


def every_position(queries: FloatArray, scope: Span, start: int) -> list[list[list[IntArray]]]:
    """`selected` of an answer that attended all of a scope (counted from `start`)."""
    positions = np.arange(scope.start + start, scope.stop + start, dtype=np.int64)
    rows, heads, group, _ = queries.shape
    return [[[positions] * group for _ in range(heads)] for _ in range(rows)]
