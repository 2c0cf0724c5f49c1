"""Between the rows of an index and the rows of the native kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from longreach.errors import InvalidRequest
from longreach.types import FloatArray, IntArray, Span, WorkFigures
from retrieval_node.index.base import IndexAnswer, IndexRows, LayerKv
from retrieval_node.kernel import BudgetedAnswer, KernelRows


def local_scope(rows: IndexRows, kv: LayerKv) -> Span:
    """The scope clipped to the positions held, counted from the first key held."""
    return Span(*_local_bounds(rows, kv))


def _local_bounds(rows: IndexRows, kv: LayerKv) -> tuple[int, int]:
    """`local_scope` as plain numbers, for the token path; (0, 0) when nothing is in scope."""
    start = max(0, rows.scope.start - kv.start)
    stop = min(kv.keys.shape[1], rows.scope.stop - kv.start)
    return (start, stop) if start < stop else (0, 0)


def call_kernel(
    batch: Sequence[IndexRows],
    kv: LayerKv,
    call: Callable[[list[KernelRows]], list[BudgetedAnswer]],
) -> list[BudgetedAnswer]:
    """The kernel's answers to the same rows; InvalidRequest if they do not fit the keys or hold
    NaN or infinity, which the kernel finds."""
    try:
        return call([kernel_rows(rows, kv) for rows in batch])
    except ValueError:
        explain_refusal(batch, kv)
        raise


def explain_refusal(batch: Iterable[IndexRows], kv: LayerKv) -> None:
    """Raise InvalidRequest if it is for their shapes, NaN or infinity that the kernel refused these
    rows."""
    for rows in batch:
        check_rows(rows, kv)


def kernel_rows(rows: IndexRows, kv: LayerKv) -> KernelRows:
    """The same rows, in keys counted from the first held. The kernel checks shapes and numbers."""
    start, stop = _local_bounds(rows, kv)
    return KernelRows(rows.queries, rows.kv_head_start, start, stop, rows.budget, rows.logit_floor)


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
    if rows.logit_floor is not None and rows.logit_floor.shape != shape[:3]:
        raise InvalidRequest(
            f"logit_floor has shape {rows.logit_floor.shape}; expected {shape[:3]} as the queries"
        )


def check_finite(rows: IndexRows) -> None:
    """Raise InvalidRequest if a query holds NaN or infinity."""
    # A sum is the quicker look; finite numbers may overflow it, hence the second.
    if not math.isfinite(rows.queries.sum()) and not np.isfinite(rows.queries).all():
        raise InvalidRequest("queries hold NaN or infinity; send finite values")


def work_in_scope(rows: IndexRows, kv: LayerKv) -> WorkFigures:
    """The part of the work figures that the scope alone decides."""
    pairs = rows.queries.shape[0] * rows.queries.shape[1] * len(local_scope(rows, kv))
    return WorkFigures(keys_in_scope=pairs, keys_covered=pairs, bytes_in_scope=pairs * kv.row_bytes)


def answer_by_budget(
    batch: Sequence[IndexRows],
    exact: Callable[[list[IndexRows]], list[IndexAnswer]],
    budgeted: Callable[[list[IndexRows]], list[IndexAnswer]],
) -> list[IndexAnswer]:
    """Answers of `exact` for entries with an exact budget and of `budgeted` for the others, in the
    batch's order; neither is called for no entries."""
    for rows in batch:
        if rows.budget.exact:
            break
    else:  # the token path, nearly always
        return budgeted(list(batch)) if batch else []
    answers: dict[int, IndexAnswer] = {}
    for wants_exact, answer in ((True, exact), (False, budgeted)):
        numbers = [i for i, rows in enumerate(batch) if rows.budget.exact == wants_exact]
        if numbers:
            answers.update(zip(numbers, answer([batch[i] for i in numbers]), strict=True))
    return [answers[i] for i in range(len(batch))]


def index_answer(
    rows: IndexRows,
    kv: LayerKv,
    answer: BudgetedAnswer,
    summary_bytes: int = 0,
) -> IndexAnswer:
    """The kernel's answer with its figures as work and its keys as positions.

    `summary_bytes` is what one value summary of the tail estimate reads.
    """
    scanned, sketched, attended, tail_rows, code_bytes, search_ns, attend_ns = answer.figures
    key_bytes = kv.keys.shape[2] * kv.keys.itemsize
    row_bytes = key_bytes + kv.values.shape[2] * kv.values.itemsize
    start, stop = _local_bounds(rows, kv)
    pairs = rows.queries.shape[0] * rows.queries.shape[1] * (stop - start)
    work = WorkFigures(
        keys_in_scope=pairs,
        keys_scanned=scanned,
        keys_sketched=sketched,
        keys_attended=attended,
        bytes_read=scanned * key_bytes
        + attended * (row_bytes - key_bytes)
        + code_bytes
        + tail_rows * summary_bytes,
        bytes_in_scope=pairs * row_bytes,
        keys_covered=pairs,
    )
    return IndexAnswer(
        answer.partial,
        work,
        search_s=search_ns * 1e-9,
        attend_s=attend_ns * 1e-9,
        selected=_positions(rows.queries, answer.selected, kv.start),
    )


def every_position(queries: FloatArray, scope: Span, start: int) -> list[list[list[IntArray]]]:
    """`selected` of an answer that attended all of a scope (counted from `start`)."""
    positions = np.arange(scope.start + start, scope.stop + start, dtype=np.int64)
    rows, heads, group, _ = queries.shape
    return [[[positions] * group for _ in range(heads)] for _ in range(rows)]


def _positions(
    queries: FloatArray, selected: list[np.ndarray] | None, start: int
) -> list[list[list[np.ndarray]]] | None:
    if selected is None:
        return None
    rows, heads, group, _ = queries.shape
    lists = iter(selected)
    return [
        [[next(lists).astype(np.int64) + start for _ in range(group)] for _ in range(heads)]
        for _ in range(rows)
    ]
