"""Index kind `flat`: exact attention, and the exact answer to every budget."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest

from longreach.attention import attention_logits, softmax_partial
from longreach.errors import InvalidRequest
from longreach.types import Budget, Span
from retrieval_node import kernel
from retrieval_node.index.base import INDEX_KINDS, BuildControl, IndexRows, LayerKv
from retrieval_node.index.flat import FlatIndex

SCALE = 0.2
START = 100


@pytest.fixture(params=kernel.supported_isas())
def tier(request):
    before = kernel.isa()
    kernel.set_isa(request.param)
    yield request.param
    kernel.set_isa(before)


def make_kv(heads=2, n=600, dim=32, value_dim=24, storage=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((heads, n, dim), np.float32).astype(storage)
    values = rng.standard_normal((heads, n, value_dim), np.float32).astype(storage)
    return LayerKv(keys, values, START)


def flat(kv) -> FlatIndex:
    control = BuildControl(progress=lambda built, total: None, cancelled=threading.Event())
    return INDEX_KINDS["flat"].build(kv, None, control)


def make_rows(kv, budget, scope, rows=2, group=3, seed=1, **more):
    rng = np.random.default_rng(seed)
    queries = 3 * rng.standard_normal((rows, kv.kv_heads, group, kv.keys.shape[2]), np.float32)
    return IndexRows(queries, 0, scope, budget, **more)


def logits_of(rows, kv, softcap=0.0):
    """[rows, heads, group, n] over all keys held."""
    queries = np.moveaxis(rows.queries, 0, 2)
    return np.moveaxis(attention_logits(queries, kv.keys[:, None], SCALE, softcap), 2, 0)


def kept_by(budget, logits, floor=-np.inf):
    """Which of the logits [n] a budget keeps, by sorting all of them."""
    if budget.exact:
        return np.ones(len(logits), bool)
    order = np.argsort(-logits, kind="stable")
    if budget.top_k is not None:
        count = budget.top_k
    elif budget.mass is not None:
        weights = np.exp(logits[order].astype(np.float64) - logits.max())
        running = np.cumsum(weights)
        count = int(np.searchsorted(running, budget.mass * running[-1])) + 1
        count = max(count, budget.floor)
        if budget.ceiling:
            count = min(count, budget.ceiling)
    else:
        count = int((logits >= logits.max() - np.float32(budget.beta)).sum())
    kept = np.zeros(len(logits), bool)
    kept[order[:count]] = True
    return kept & (logits >= floor)


BUDGETS = (
    Budget(exact=True),
    Budget(top_k=1),
    Budget(top_k=50),
    Budget(top_k=10_000),
    Budget(mass=0.9),
    Budget(mass=0.5, floor=20, ceiling=30),
    Budget(mass=0.99, ceiling=10),
    Budget(beta=2.0),
    Budget(beta=0.0),
)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_every_budget_keeps_exactly_the_keys_that_sorting_all_logits_keeps(tier, budget, softcap):
    kv = make_kv()
    scope = Span(START + 7, START + 590)
    rows = make_rows(kv, budget, scope)
    [answer] = flat(kv).attend([rows], SCALE, softcap, want_selected=True)
    logits = logits_of(rows, kv, softcap)[..., 7:590]
    kept = np.apply_along_axis(lambda z: kept_by(budget, z), -1, logits)
    expected = softmax_partial(logits[..., None, :], kv.values[:, None, 7:590], kept[..., None, :])
    np.testing.assert_allclose(answer.partial.output, expected.output[..., 0, :], atol=3e-5)
    np.testing.assert_allclose(answer.partial.lse, expected.lse[..., 0], atol=3e-5)
    for index in np.ndindex(*logits.shape[:3]):
        row, head, member = index
        positions = np.flatnonzero(kept[index]) + START + 7
        np.testing.assert_array_equal(answer.selected[row][head][member], positions)


@pytest.mark.parametrize("budget", [Budget(top_k=40), Budget(mass=0.95), Budget(beta=5.0)], ids=str)
def test_keys_below_the_logit_floor_are_dropped(tier, budget):
    kv = make_kv()
    rows = make_rows(kv, budget, Span(START, START + 600))
    logits = logits_of(rows, kv)
    floor = np.quantile(logits, 0.98, axis=-1).astype(np.float32)
    floor[0, 0, 0] = 1e9  # this head may use nothing
    rows = make_rows(kv, budget, Span(START, START + 600), logit_floor=floor)
    [answer] = flat(kv).attend([rows], SCALE, want_selected=True)
    for index in np.ndindex(*floor.shape):
        expected = np.flatnonzero(kept_by(budget, logits[index], floor[index])) + START
        row, head, member = index
        np.testing.assert_array_equal(answer.selected[row][head][member], expected)
    assert np.isneginf(answer.partial.lse[0, 0, 0])
    assert not answer.partial.output[0, 0, 0].any()


def test_an_exact_budget_ignores_the_logit_floor():
    kv = make_kv()
    scope = Span(START, START + 600)
    rows = make_rows(kv, Budget(exact=True), scope)
    floor = np.full(rows.queries.shape[:3], 1e9, np.float32)
    floored = make_rows(kv, Budget(exact=True), scope, logit_floor=floor)
    answers = flat(kv).attend([rows, floored], SCALE)
    np.testing.assert_array_equal(answers[0].partial.lse, answers[1].partial.lse)


def test_the_batch_comes_back_in_order_whatever_the_budgets():
    kv = make_kv()
    batch = [
        make_rows(kv, budget, Span(START, START + 300), rows=rows, seed=rows)
        for rows, budget in enumerate(BUDGETS, start=1)
    ]
    together = flat(kv).attend(batch, SCALE)
    for rows, answer in zip(batch, together, strict=True):
        [alone] = flat(kv).attend([rows], SCALE)
        assert answer.partial.lse.shape == rows.queries.shape[:3]
        np.testing.assert_allclose(answer.partial.output, alone.partial.output, atol=1e-6)


def test_work_of_an_exact_budget_is_the_whole_scope():
    kv = make_kv(storage=ml_dtypes.bfloat16)
    rows = make_rows(kv, Budget(exact=True), Span(0, START + 50))
    work = flat(kv).attend([rows], SCALE)[0].work
    pairs = 2 * 2 * 50  # rows x heads x positions held of the scope
    assert work.keys_in_scope == work.keys_scanned == work.keys_attended == pairs
    assert work.keys_covered == pairs
    assert work.keys_sketched == 0
    assert work.bytes_read == work.bytes_in_scope == pairs * (32 + 24) * 2


def test_work_of_a_fixed_budget_counts_keys_read_and_keys_any_query_head_kept():
    kv = make_kv(heads=1)
    rows = make_rows(kv, Budget(top_k=5), Span(START, START + 600), rows=1)
    [answer] = flat(kv).attend([rows], SCALE, want_selected=True)
    union = set().union(*(set(ids.tolist()) for ids in answer.selected[0][0]))
    assert answer.work.keys_scanned == answer.work.keys_in_scope == 600
    assert answer.work.keys_attended == len(union)
    assert answer.work.bytes_read == 600 * 32 * 4 + len(union) * 24 * 4


@pytest.mark.parametrize("scope", [Span(0, 50), Span(900, 1000), Span(START, START)], ids=str)
@pytest.mark.parametrize("budget", [Budget(exact=True), Budget(top_k=3)], ids=str)
def test_a_scope_outside_the_positions_held_is_empty(scope, budget):
    kv = make_kv()
    rows = make_rows(kv, budget, scope)
    [answer] = flat(kv).attend([rows], SCALE, want_selected=True)
    assert np.isneginf(answer.partial.lse).all()
    assert not answer.partial.output.any()
    assert answer.work.keys_in_scope == answer.work.keys_attended == 0
    assert all(len(ids) == 0 for row in answer.selected for head in row for ids in head)


def test_some_heads_of_the_layer_can_be_asked_alone():
    kv = make_kv(heads=3)
    full = make_rows(kv, Budget(top_k=9), Span(START, START + 600))
    part = IndexRows(full.queries[:, 1:2], 1, full.scope, full.budget)
    whole, alone = flat(kv).attend([full, part], SCALE)
    np.testing.assert_array_equal(whole.partial.output[:, 1:2], alone.partial.output)


def test_nan_keys_poison_the_answer_instead_of_crashing_the_selection(tier):
    kv = make_kv()
    kv.keys[0, ::3] = np.nan
    rows = make_rows(kv, Budget(top_k=5), Span(START, START + 600))
    [answer] = flat(kv).attend([rows], SCALE)
    assert np.isnan(answer.partial.output[:, 0]).all()
    assert np.isfinite(answer.partial.output[:, 1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: IndexRows(rows.queries[..., :7], 0, rows.scope, rows.budget), "shape"),
        (lambda rows: IndexRows(rows.queries, 1, rows.scope, rows.budget), r"KV heads \[1, 3\)"),
        (lambda rows: IndexRows(rows.queries, -1, rows.scope, rows.budget), r"KV heads \[-1, 1\)"),
        (lambda rows: IndexRows(rows.queries * np.nan, 0, rows.scope, rows.budget), "NaN"),
        (
            lambda rows: IndexRows(
                rows.queries, 0, rows.scope, rows.budget, np.zeros((1, 2), np.float32)
            ),
            "logit_floor has shape",
        ),
    ],
)
@pytest.mark.parametrize("budget", [Budget(exact=True), Budget(top_k=5)], ids=str)
def test_rows_that_do_not_fit_are_refused_by_name(change, message, budget):
    kv = make_kv()
    rows = make_rows(kv, budget, Span(START, START + 600))
    with pytest.raises(InvalidRequest, match=message):
        flat(kv).attend([change(rows)], SCALE)


def test_flat_needs_no_build_and_no_memory():
    assert not FlatIndex.needs_build
    assert flat(make_kv()).index_bytes == 0
