"""Attend: rows of many sessions become one call per index, and their partials are merged.

    plan      each row's scope is cut along the shards of its context and the session's tail
    search    every index that is asked answers all its rows in one call, and the tails of all
              sessions, as far as they have no index, are attended exactly in one more
    merge     a row's partials, over disjoint positions or heads, are merged by log-sum-exp

The budget of a row applies to each index by itself, be it over a shard or over a full chunk of a
tail: `top_k` and the bounds `floor` and `ceiling` count per index, `mass` is a share of the mass
within each (so the whole keeps at least that share where no ceiling cuts it), and `beta` counts
from the highest logit of each. Only `logit_floor` and the exact budget mean the same however a
scope is cut. Tail positions without an index are attended whatever the budget.

A row that cannot be planned is an error for that row alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from longreach.attention import empty_partial, merge
from longreach.errors import InvalidRequest, LongreachError, MalformedTensor
from longreach.types import (
    AttendResult,
    AttendRows,
    Budget,
    FloatArray,
    LayerGeometry,
    PartialAttention,
    Span,
    WorkFigures,
)
from retrieval_node.contexts import Context
from retrieval_node.index.base import Index, IndexAnswer, IndexRows, LayerKv
from retrieval_node.index.kernel_index import attend_whole
from retrieval_node.integrity import is_finite
from retrieval_node.sessions import Session

_EXACT = Budget(exact=True)


@dataclass(slots=True)
class RowPart:
    """What one index is asked for one row, and what it answered; without an index, what `kv` is
    asked, exactly. Heads count from the row's."""

    index: Index | None
    kv: LayerKv
    rows: IndexRows
    first_head: int
    answer: IndexAnswer | None = None


@dataclass(slots=True)
class _Plan:
    """A row that can be answered, with the parts that will."""

    rows: AttendRows
    geometry: LayerGeometry
    queries: FloatArray
    floor: FloatArray | None
    row_bytes: int
    parts: list[RowPart] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AnsweredRow:
    """A row as it was asked and answered: queries [rows, heads, group, head_dim] float32, the parts
    that answered, and their merged answer."""

    queries: FloatArray
    budget: Budget
    parts: Sequence[RowPart]
    result: AttendResult
    scale: float
    softcap: float


@dataclass(frozen=True, slots=True)
class Attended:
    """Results in the order of the rows, and the wall time of the index calls, seconds."""

    results: list[AttendResult | LongreachError]
    search_s: float
    attend_s: float


def attend(
    layer: int,
    rows: Sequence[AttendRows],
    scale: float,
    softcap: float,
    find: Callable[[int], tuple[Session, Context | None]],
    watch: Callable[[Sequence[AnsweredRow]], None] | None = None,
) -> Attended:
    """Partial attention of every row; `find` gives a handle's session and context, or raises.
    `watch` is shown the rows that were answered; it must not take long."""
    results: list[AttendResult | LongreachError | None] = [None] * len(rows)
    plans: dict[int, _Plan] = {}
    for number, each in enumerate(rows):
        try:
            plans[number] = _plan(layer, each, *find(each.handle))
        except LongreachError as error:
            results[number] = error
    began = time.perf_counter()
    _search([part for plan in plans.values() for part in plan.parts], scale, softcap)
    wall_s = time.perf_counter() - began
    search_s = 0.0
    answered: list[AnsweredRow] = []
    for number, plan in plans.items():
        result = _merged(plan)
        results[number] = result
        search_s += result.search_s
        if watch is not None:
            answered.append(
                AnsweredRow(plan.queries, plan.rows.budget, plan.parts, result, scale, softcap)
            )
    if watch is not None:
        watch(answered)
    search_s = min(search_s, wall_s)
    return Attended([r for r in results if r is not None], search_s, wall_s - search_s)


def _plan(layer: int, rows: AttendRows, session: Session, context: Context | None) -> _Plan:
    geometry = _geometry(layer, session, context)
    queries, floor = _checked(rows, geometry)
    row_bytes = (geometry.head_dim + geometry.value_dim) * session.dtype.itemsize
    plan = _Plan(rows, geometry, queries, floor, row_bytes)
    context_scope = rows.scope.intersect(Span(0, session.record.context_stop))
    if context is not None and len(context_scope):
        for served in context.by_layer.get(layer, ()):
            shard = served.sealed.shard
            scope = context_scope.intersect(shard.span)
            heads = (shard.kv_head_start, shard.kv_head_stop)
            _add_part(
                plan, served.indexes.serving[layer], served.sealed.layers[layer], heads, scope
            )
    if rows.scope.stop > session.record.context_stop:
        for piece in session.tail_view(layer):
            heads = (piece.place.kv_head_start, piece.place.kv_head_stop)
            scope = rows.scope.intersect(piece.kv.positions)
            _add_part(plan, piece.index, piece.kv, heads, scope)
    return plan


def _geometry(layer: int, session: Session, context: Context | None) -> LayerGeometry:
    geometry = session.geometry.get(layer) or (context.geometry.get(layer) if context else None)
    if geometry is None:
        raise InvalidRequest(
            f"layer {layer} is not among the layers that session {session.record.session_id!r} "
            "has on this node; follow the shard map",
            reason="UNKNOWN_LAYER",
        )
    if geometry.sliding_window:
        raise InvalidRequest(
            f"layer {layer} has a sliding window of {geometry.sliding_window} tokens: it is stored "
            "but never searched; attend it on the worker",
            reason="SLIDING_LAYER",
        )
    return geometry


def _checked(rows: AttendRows, geometry: LayerGeometry) -> tuple[FloatArray, FloatArray | None]:
    """Queries [rows, heads, group, head_dim] and floor [rows, heads, group], both float32."""
    start, stop = rows.kv_head_start, rows.kv_head_stop
    if not 0 <= start < stop <= geometry.kv_heads:
        raise InvalidRequest(
            f"rows ask KV heads [{start}, {stop}) of layer {geometry.layer}, which has "
            f"{geometry.kv_heads}"
        )
    shape = rows.queries.shape
    q_heads = (stop - start) * geometry.group
    if len(shape) != 3 or shape[0] < 1 or shape[1:] != (q_heads, geometry.head_dim):
        raise MalformedTensor(
            f"queries are {shape}; expected [1 or more rows, {q_heads}, {geometry.head_dim}] for "
            f"KV heads [{start}, {stop}) of layer {geometry.layer}"
        )
    if not is_finite(rows.queries).all():
        raise MalformedTensor(
            f"queries of layer {geometry.layer} hold NaN or infinity; the model overflowed or the "
            "sender is broken"
        )
    grouped = (shape[0], stop - start, geometry.group)
    queries = np.asarray(rows.queries, np.float32).reshape(*grouped, geometry.head_dim)
    if rows.logit_floor is None:
        return queries, None
    if rows.logit_floor.shape != shape[:2] or np.isnan(rows.logit_floor).any():
        raise MalformedTensor(
            f"logit_floor is {rows.logit_floor.shape}; expected {shape[:2]} without NaN"
        )
    return queries, np.asarray(rows.logit_floor, np.float32).reshape(grouped)


def _add_part(
    plan: _Plan, index: Index | None, kv: LayerKv, held_heads: tuple[int, int], scope: Span
) -> None:
    first = max(plan.rows.kv_head_start, held_heads[0])
    stop = min(plan.rows.kv_head_stop, held_heads[1])
    if first >= stop or not len(scope):
        return
    heads = slice(first - plan.rows.kv_head_start, stop - plan.rows.kv_head_start)
    floor = None if plan.floor is None else plan.floor[:, heads]
    budget = _EXACT if index is None else plan.rows.budget
    rows = IndexRows(plan.queries[:, heads], first - held_heads[0], scope, budget, floor)
    plan.parts.append(RowPart(index, kv, rows, heads.start))


def _search(parts: Iterable[RowPart], scale: float, softcap: float) -> None:
    by_index: dict[Index, list[RowPart]] = {}
    whole: list[RowPart] = []
    for part in parts:
        (whole if part.index is None else by_index.setdefault(part.index, [])).append(part)
    for index, asked in by_index.items():
        answers = index.attend([part.rows for part in asked], scale, softcap)
        for part, answer in zip(asked, answers, strict=True):
            part.answer = answer
    if whole:
        each = attend_whole([(part.kv, [part.rows]) for part in whole], scale, softcap)
        for part, [answer] in zip(whole, each, strict=True):
            part.answer = answer


def _merged(plan: _Plan) -> AttendResult:
    rows, heads, group = plan.queries.shape[:3]
    partials: list[PartialAttention] = []
    scanned = sketched = attended = read = covered = 0
    search_s = attend_s = 0.0
    kinds: list[str] = []
    for part in plan.parts:
        answer = part.answer
        assert answer is not None
        partials.append(_all_heads(answer.partial, part.first_head, heads))
        scanned += answer.work.keys_scanned
        sketched += answer.work.keys_sketched
        attended += answer.work.keys_attended
        read += answer.work.bytes_read
        covered += rows * part.rows.queries.shape[1] * len(part.rows.scope)
        search_s += answer.search_s
        attend_s += answer.attend_s
        if part.index is not None and part.index.kind not in kinds:
            kinds.append(part.index.kind)
    if not partials:
        partials = [empty_partial((rows, heads, group), plan.geometry.value_dim)]
    merged = merge(partials)
    in_scope = rows * heads * len(plan.rows.scope)
    return AttendResult(
        PartialAttention(
            merged.output.reshape(rows, heads * group, plan.geometry.value_dim),
            merged.lse.reshape(rows, heads * group),
        ),
        WorkFigures(
            keys_in_scope=in_scope,
            keys_scanned=scanned,
            keys_sketched=sketched,
            keys_attended=attended,
            bytes_read=read,
            bytes_in_scope=in_scope * plan.row_bytes,
            keys_covered=covered,
        ),
        "+".join(kinds),
        search_s,
        attend_s,
    )


def _all_heads(partial: PartialAttention, first: int, heads: int) -> PartialAttention:
    """A partial over some heads as one over all: heads it lacks saw no key."""
    if partial.lse.shape[1] == heads:
        return partial
    rows, held, group = partial.lse.shape
    whole = empty_partial((rows, heads, group), partial.output.shape[-1])
    whole.output[:, first : first + held] = partial.output
    whole.lse[:, first : first + held] = partial.lse
    return whole
