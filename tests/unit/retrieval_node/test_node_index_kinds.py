"""The matrix that every registered index kind passes, over scopes of 1%, 50% and 100%."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

import retrieval_node.index  # noqa: F401  (registers every kind)
from benchmarks.synthetic import workload
from longreach.attention import attention_logits, softmax_partial
from longreach.errors import Cancelled, InvalidRequest
from longreach.types import Budget, FloatArray, PartialAttention, QuerySample, Span
from retrieval_node.index import auto
from retrieval_node.index.base import INDEX_KINDS, BuildControl, Index, IndexRows, LayerKv
from retrieval_node.index.search import SearchIndex

KINDS = list(INDEX_KINDS)
BUILT_KINDS = [kind for kind in KINDS if INDEX_KINDS[kind].needs_build and kind != "auto"]
START = 1000
KEYS = 12_288
SCOPES = {
    "1%": Span(START + 6000, START + 6123),
    "50%": Span(START + 2000, START + 2000 + KEYS // 2),
    "100%": Span(0, START + KEYS + 5000),
}
BUDGETS = ["top_k=64", "mass=0.9[16,1024]", "mass=0.7", "beta=3"]
EXACT_KINDS = ("flat", "auto")
"""Kinds that find every key; `auto` is `flat` at this size."""
USUAL_RECALL = 0.95
"""What kinds that state no recall of their own are held to."""
TOLERANCE = 2e-3
"""Of outputs and LSEs against the fp32 reference over the same 16-bit keys and values."""


@dataclass(frozen=True)
class Layer:
    """One layer of a shard, its sampled queries, and decode queries [rows, heads, group, d]."""

    kv: LayerKv
    sample: QuerySample
    queries: FloatArray
    scale: float


@cache
def layer(
    keys: int = KEYS, head_dim: int = 64, group: int = 4, dtype: str = "bfloat16", rows: int = 3
) -> Layer:
    heads = [
        workload(keys, head_dim=head_dim, group=group, steps=32, prefill=2048, seed=seed)
        for seed in (1, 2)
    ]
    kv = LayerKv(
        np.stack([head.keys for head in heads]).astype(dtype),
        np.stack([head.values for head in heads]).astype(dtype),
        START,
    )
    sample = QuerySample(
        0,
        0,
        heads[0].prefill_positions + START,
        np.concatenate([head.prefill_queries for head in heads]),
    )
    # workload's queries are [group, steps, d] for each head.
    queries = np.stack([head.decode_queries[:, :rows] for head in heads])
    return Layer(kv, sample, np.ascontiguousarray(queries.transpose(2, 0, 1, 3)), heads[0].scale)


def stated_recall(kind: str) -> float:
    """The least share of a budget's keys that a kind must find."""
    if kind in EXACT_KINDS:
        return 0.999
    return float(getattr(INDEX_KINDS[kind], "stated_recall", USUAL_RECALL))


def control(cancelled: threading.Event | None = None) -> BuildControl:
    return BuildControl(lambda built, total: None, cancelled or threading.Event())


@cache
def built(kind: str) -> Index:
    return INDEX_KINDS[kind].build(layer().kv, layer().sample, control())


@cache
def logits_of(data: Layer, softcap: float = 0.0) -> FloatArray:
    """Reference logits [rows, heads, group, n]."""
    return attention_logits(data.queries, data.kv.keys[None], data.scale, softcap)


# Layer holds arrays, so it is hashed by identity; the cached factory makes each only once.
Layer.__hash__ = object.__hash__  # type: ignore[method-assign]
Layer.__eq__ = object.__eq__  # type: ignore[method-assign]


def in_scope(data: Layer, scope: Span) -> np.ndarray:
    positions = np.arange(data.kv.keys.shape[1]) + data.kv.start
    return (positions >= scope.start) & (positions < scope.stop)


def keys_of_budget(logits: FloatArray, budget: Budget) -> np.ndarray:
    """Indices into sorted-by-position logits [n] that the budget keeps, by its definition."""
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order].astype(np.float64)
    if budget.top_k is not None:
        return order[: budget.top_k]
    if budget.beta is not None:
        return order[ranked >= ranked[0] - budget.beta]
    shares = np.cumsum(np.exp(ranked - ranked[0]))
    count = int(np.searchsorted(shares, budget.mass * shares[-1])) + 1
    return order[: min(max(count, budget.floor), budget.ceiling or count)]


def attention_over(data: Layer, selected: list[list[list[np.ndarray]]]) -> PartialAttention:
    """Softmax attention of every query over its own list of positions."""
    rows, heads, group, _ = data.queries.shape
    keep = np.zeros((rows, heads, group, data.kv.keys.shape[1]), bool)
    for r, h, g in np.ndindex(rows, heads, group):
        keep[r, h, g, selected[r][h][g] - data.kv.start] = True
    return softmax_partial(logits_of(data), data.kv.values[None], keep)


def answer(kind: str, budget: str, scope: Span, data: Layer | None = None, **changes: object):
    data = data or layer()
    rows = IndexRows(data.queries, 0, scope, Budget.parse(budget))
    index = built(kind)
    return index.attend([rows._replace(**changes)], data.scale, want_selected=True)[0]


def assert_same(got: PartialAttention, expected: PartialAttention) -> None:
    np.testing.assert_allclose(got.lse, expected.lse, atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(got.output, expected.output, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_budget_equals_full_attention(kind: str, scope: str) -> None:
    data = layer()
    expected = softmax_partial(logits_of(data), data.kv.values[None], in_scope(data, SCOPES[scope]))
    assert_same(answer(kind, "exact", SCOPES[scope]).partial, expected)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_softmax_attention_over_the_selected_keys(
    kind: str, scope: str, budget: str
) -> None:
    data = layer()
    got = answer(kind, budget, SCOPES[scope])
    assert_same(got.partial, attention_over(data, got.selected))
    allowed = in_scope(data, SCOPES[scope])
    for r, h, g in np.ndindex(data.queries.shape[:3]):
        keys = got.selected[r][h][g] - START
        assert allowed[keys].all()
        assert len(np.unique(keys)) == len(keys)
        if budget.startswith("top_k"):
            assert len(keys) == min(64, np.count_nonzero(allowed))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_recall_of_the_budgets_keys_is_at_least_the_stated_one(
    kind: str, scope: str, budget: str
) -> None:
    data = layer()
    selected = answer(kind, budget, SCOPES[scope]).selected
    allowed = np.flatnonzero(in_scope(data, SCOPES[scope]))
    recalls = []
    for r, h, g in np.ndindex(data.queries.shape[:3]):
        wanted = allowed[keys_of_budget(logits_of(data)[r, h, g, allowed], Budget.parse(budget))]
        recalls.append(np.isin(wanted + START, selected[r][h][g]).mean())
    assert np.mean(recalls) >= stated_recall(kind)


@pytest.mark.parametrize("scope", ["50%", "100%"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tail_estimate_brings_the_lse_closer_to_full_attention(kind: str, scope: str) -> None:
    data = layer()
    full = softmax_partial(logits_of(data), data.kv.values[None], in_scope(data, SCOPES[scope]))
    without = np.abs(answer(kind, "top_k=64", SCOPES[scope]).partial.lse - full.lse).mean()
    estimated = answer(kind, "top_k=64+tail", SCOPES[scope]).partial
    assert np.abs(estimated.lse - full.lse).mean() <= max(without, TOLERANCE)
    assert np.isfinite(estimated.output).all()


@pytest.mark.parametrize(
    "scope", [Span(START + 50, START + 50), Span(0, START), Span(90_000, 99_000)]
)
@pytest.mark.parametrize("budget", ["exact", *BUDGETS])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scope_without_keys_gives_empty_attention(kind: str, budget: str, scope: Span) -> None:
    got = answer(kind, budget, scope)
    assert np.isneginf(got.partial.lse).all()
    assert not got.partial.output.any()
    assert got.work.keys_in_scope == got.work.keys_attended == 0


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_several_sessions_in_one_call_are_answered_as_if_alone(kind: str) -> None:
    data = layer()
    batch = [
        IndexRows(data.queries[:1], 0, SCOPES["100%"], Budget(top_k=64)),
        IndexRows(data.queries[1:], 0, SCOPES["1%"], Budget(beta=3.0)),
        IndexRows(data.queries[:2, 1:], 1, SCOPES["50%"], Budget(exact=True)),
        IndexRows(data.queries[2:, 1:], 1, SCOPES["50%"], Budget(mass=0.9, ceiling=512)),
    ]
    together = built(kind).attend(batch, data.scale)
    for rows, got in zip(batch, together, strict=True):
        alone = built(kind).attend([rows], data.scale)[0]
        assert_same(got.partial, alone.partial)
        assert got.work == alone.work
        assert got.partial.output.shape == (*rows.queries.shape[:3], data.kv.values.shape[2])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_work_figures_count_what_was_done(kind: str, scope: str) -> None:
    data = layer()
    got = answer(kind, "top_k=64", SCOPES[scope])
    rows, heads, _ = data.queries.shape[:3]
    keys = int(np.count_nonzero(in_scope(data, SCOPES[scope])))
    assert got.work.keys_in_scope == got.work.keys_covered == rows * heads * keys
    assert got.work.bytes_in_scope == got.work.keys_in_scope * data.kv.row_bytes
    attended = sum(
        len(np.unique(np.concatenate(got.selected[r][h]))) for r, h in np.ndindex(rows, heads)
    )
    assert got.work.keys_attended == attended
    assert got.work.keys_scanned >= attended
    assert got.work.keys_scanned <= rows * heads * KEYS
    assert got.work.bytes_read >= attended * data.kv.row_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_keys_below_the_logit_floor_may_go_but_those_above_it_stay(kind: str) -> None:
    data = layer()
    top = logits_of(data).max(axis=-1)
    floor = np.asarray(top - 2.0, np.float32)
    selected = answer(kind, "top_k=64", SCOPES["100%"], logit_floor=floor).selected
    found = wanted = 0
    for r, h, g in np.ndindex(data.queries.shape[:3]):
        best = keys_of_budget(logits_of(data)[r, h, g], Budget(top_k=64))
        above = best[logits_of(data)[r, h, g, best] >= floor[r, h, g]]
        wanted += len(above)
        found += np.isin(above + START, selected[r][h][g]).sum()
    assert found >= stated_recall(kind) * wanted


@pytest.mark.parametrize("kind", KINDS)
def test_a_softcap_bounds_the_logits(kind: str) -> None:
    data = layer()
    rows = IndexRows(data.queries, 0, SCOPES["100%"], Budget(top_k=64))
    got = built(kind).attend([rows], data.scale, 5.0, want_selected=True)[0]
    keep = np.zeros((*data.queries.shape[:3], KEYS), bool)
    for r, h, g in np.ndindex(data.queries.shape[:3]):
        keep[r, h, g, got.selected[r][h][g] - START] = True
    assert_same(got.partial, softmax_partial(logits_of(data, 5.0), data.kv.values[None], keep))
    assert got.partial.lse.max() <= 5.0 + np.log(64) + TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_calls_from_several_threads_get_the_same_answers(kind: str) -> None:
    expected = answer(kind, "top_k=64", SCOPES["100%"])
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: answer(kind, "top_k=64", SCOPES["100%"]), range(8)))
    for got in answers:
        assert_same(got.partial, expected.partial)
        assert got.work == expected.work


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_shapes_and_other_dtypes_are_served(kind: str, dtype: str) -> None:
    data = layer(keys=5003, head_dim=40, group=6, dtype=dtype, rows=2)
    index = INDEX_KINDS[kind].build(data.kv, data.sample, control())
    rows = IndexRows(data.queries, 0, SCOPES["100%"], Budget(top_k=64))
    got = index.attend([rows], data.scale, want_selected=True)[0]
    assert_same(got.partial, attention_over(data, got.selected))


@pytest.mark.parametrize("keys", [1, 2, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_of_a_few_keys_is_served(kind: str, keys: int) -> None:
    data = layer()
    kv = LayerKv(data.kv.keys[:, :keys], data.kv.values[:, :keys], START)
    index = INDEX_KINDS[kind].build(kv, data.sample, control())
    rows = IndexRows(data.queries, 0, SCOPES["100%"], Budget(top_k=64))
    few = logits_of(data)[..., :keys]
    keep = few >= np.sort(few)[..., -min(64, keys), None]
    assert_same(
        index.attend([rows], data.scale)[0].partial,
        softmax_partial(few, kv.values[None], keep),
    )


@pytest.mark.parametrize("kind", BUILT_KINDS)
def test_a_cancelled_build_stops(kind: str) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(Cancelled):
        INDEX_KINDS[kind].build(layer().kv, layer().sample, control(cancelled))


@pytest.mark.parametrize("kind", BUILT_KINDS)
def test_a_build_reports_every_kv_head(kind: str) -> None:
    data = layer()
    kv = LayerKv(data.kv.keys[:, :500], data.kv.values[:, :500], START)
    seen: list[tuple[int, int]] = []
    reporting = BuildControl(lambda built, total: seen.append((built, total)), threading.Event())
    index = INDEX_KINDS[kind].build(kv, data.sample, reporting)
    assert seen[-1] == (2, 2)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert index.index_bytes > 0


@pytest.mark.parametrize("kind", KINDS)
def test_queries_of_another_shape_are_refused(kind: str) -> None:
    rows = IndexRows(np.zeros((1, 2, 4, 7), np.float32), 0, SCOPES["100%"], Budget(top_k=64))
    with pytest.raises(InvalidRequest, match="shape"):
        built(kind).attend([rows], 1.0)


SMALL_SCOPE = Span(START, START + 1500)
HEAD_SIZES = [64, 80, 96, 128, 256]


@pytest.fixture
def searching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets kinds that read short scopes whole search them, so that small builds test the search."""
    monkeypatch.setattr(SearchIndex, "exact_scope", 64)
    monkeypatch.setattr(auto, "EXACT_BELOW", 64)


def built_over(kind: str, data: Layer, keys: np.ndarray) -> tuple[Index, Layer]:
    """An index over other keys with the queries of `data`."""
    changed = replace(data, kv=LayerKv(keys, data.kv.values, START))
    return INDEX_KINDS[kind].build(changed.kv, data.sample, control()), changed


def assert_sound(index: Index, data: Layer, budget: str) -> list[list[list[np.ndarray]]]:
    """The answer is softmax attention over distinct keys of the scope; returns those."""
    rows = IndexRows(data.queries, 0, SMALL_SCOPE, Budget.parse(budget))
    got = index.attend([rows], data.scale, want_selected=True)[0]
    assert_same(got.partial, attention_over(data, got.selected))
    for r, h, g in np.ndindex(data.queries.shape[:3]):
        chosen = got.selected[r][h][g]
        assert len(np.unique(chosen)) == len(chosen)
        assert ((chosen >= SMALL_SCOPE.start) & (chosen < SMALL_SCOPE.stop)).all()
    return got.selected


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_usual_head_size_is_searched(kind: str, head_dim: int, searching: None) -> None:
    data = layer(keys=1500, head_dim=head_dim, group=2, rows=2)
    index = INDEX_KINDS[kind].build(data.kv, data.sample, control())
    selected = assert_sound(index, data, "top_k=8")
    assert {len(each) for row in selected for head in row for each in head} == {8}


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_more_keys_than_there_are_takes_them_all(kind: str, searching: None) -> None:
    data = layer(keys=1500, head_dim=64, group=2, rows=2)
    index = INDEX_KINDS[kind].build(data.kv, data.sample, control())
    selected = assert_sound(index, data, "top_k=4000")
    assert {len(each) for row in selected for head in row for each in head} == {1500}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [*BUILT_KINDS, "auto"])
def test_a_key_that_is_not_finite_is_refused(kind: str, value: float, searching: None) -> None:
    # Nodes refuse such K and V when they are put; `flat`, which builds nothing, relies on that.
    data = layer(keys=1500, head_dim=64, group=2, rows=2)
    keys = data.kv.keys.copy()
    keys[1, 700, 3] = value
    with pytest.raises(InvalidRequest, match="NaN or infinity") as raised:
        built_over(kind, data, keys)
    assert raised.value.reason == "KEYS_NOT_FINITE"


@pytest.mark.parametrize("budget", ["exact", "top_k=8", "mass=0.5", "beta=1", "top_k=8+tail"])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_keys_all_count_the_same(kind: str, budget: str, searching: None) -> None:
    data = layer(keys=1500, head_dim=64, group=2, rows=2)
    index, data = built_over(kind, data, np.zeros_like(data.kv.keys))
    rows = IndexRows(data.queries, 0, SMALL_SCOPE, Budget.parse(budget))
    got = index.attend([rows], data.scale, want_selected=True)[0]
    assert np.isfinite(got.partial.output).all()
    if budget.endswith("tail"):
        # What is attended counts in full; an estimate may add the rest, but no more.
        assert (got.partial.lse >= np.log(8) - TOLERANCE).all()
        assert (got.partial.lse <= np.log(1500) + TOLERANCE).all()
        return
    counts = [len(each) for row in got.selected for head in row for each in head]
    np.testing.assert_allclose(got.partial.lse.ravel(), np.log(counts), atol=1e-3)
    if budget == "exact":
        assert set(counts) == {1500}
    if budget == "top_k=8":
        assert set(counts) == {8}


@pytest.mark.parametrize("budget", ["top_k=8", "mass=0.9", "beta=3"])
@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_repeat_are_each_attended_once(kind: str, budget: str, searching: None) -> None:
    data = layer(keys=1500, head_dim=64, group=2, rows=2)
    index, data = built_over(kind, data, np.tile(data.kv.keys[:, :10], (1, 150, 1)))
    selected = assert_sound(index, data, budget)
    if budget == "top_k=8":
        assert {len(each) for row in selected for head in row for each in head} == {8}
