"""Index kind `sketch`: what it finds, what it estimates, and that it never breaks a scope."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest

from longreach.attention import attention_logits, softmax_partial
from longreach.errors import Cancelled, InvalidRequest
from longreach.types import Budget, QuerySample, Span
from retrieval_node import kernel
from retrieval_node.index.base import INDEX_KINDS, BuildControl, IndexRows, LayerKv
from retrieval_node.index.sketch import SketchIndex
from retrieval_node.index.sketch_fit import fit_sketch

DIM = 64
SCALE = DIM**-0.5
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Heads:
    """Keys, values and queries of one layer, drawn like attention heads.

    Keys have a large mean and a decaying spectrum; queries look mostly along directions in which
    keys vary little (RetrievalAttention, section 2.3: queries are out of the keys' distribution).
    """

    def __init__(self, n, kv_heads=1, group=4, seed=0, value_dim=DIM, storage=BFLOAT16, start=0):
        rng = np.random.default_rng(seed)
        spectrum = np.arange(1, DIM + 1) ** -0.6
        basis = [np.linalg.qr(rng.standard_normal((DIM, DIM)))[0] for _ in range(kv_heads)]
        topics = rng.standard_normal((kv_heads, 200, DIM)) * spectrum
        of_key = np.repeat(rng.integers(0, 200, n // 80 + 1), 80)[:n]  # text stays on a topic
        keys = topics[:, of_key] + 0.5 * rng.standard_normal((kv_heads, n, DIM)) * spectrum
        keys = np.stack([k @ b for k, b in zip(keys, basis, strict=True)]) + 2.0
        values = rng.standard_normal((kv_heads, 200, value_dim))[:, of_key]
        values = values + 0.5 * rng.standard_normal((kv_heads, n, value_dim))
        self.kv = LayerKv(keys.astype(storage), values.astype(storage), start)
        self.group = group
        self._rng, self._topics, self._basis = rng, topics, basis
        # Against the spectrum, so that the keys' weak directions weigh as much as the strong ones.
        self._look = 6.0 / spectrum / np.linalg.norm(1 / spectrum) * np.sqrt(DIM)

    def queries(self, rows):
        """[rows, kv_heads, group, DIM] float32, each drawn to some topic."""
        heads = []
        for topics, basis in zip(self._topics, self._basis, strict=True):
            wanted = topics[self._rng.integers(0, 200, (rows, self.group))]
            noise = 0.3 * self._rng.standard_normal(wanted.shape)
            heads.append((wanted * self._look**2 * 0.15 + noise * self._look) * 10 @ basis)
        return np.stack(heads, axis=1).astype(np.float32)

    def sample(self, count=256):
        queries = np.moveaxis(self.queries(count), 0, 2).reshape(-1, count, DIM)
        return QuerySample(0, 0, np.arange(count), queries)

    def reference(self, queries, start=0, stop=None, softcap=0.0):
        """Full attention over keys [start, stop), and its logits [rows, heads, group, keys]."""
        keys, values = self.kv.keys[:, start:stop], self.kv.values[:, start:stop]
        moved = np.moveaxis(queries, 0, 2)
        logits = attention_logits(moved, keys[:, None], SCALE, softcap)
        part = softmax_partial(logits, values[:, None])
        return (
            np.moveaxis(part.output, 2, 0),
            np.moveaxis(part.lse, 2, 0),
            np.moveaxis(logits, 2, 0),
        )


def build(heads, sample=True):
    control = BuildControl(progress=lambda built, total: None, cancelled=threading.Event())
    return INDEX_KINDS["sketch"].build(heads.kv, heads.sample() if sample else None, control)


@pytest.fixture(scope="module")
def long():
    """20,000 keys of two KV heads (neither a multiple of 16 nor of 64), and their index."""
    heads = Heads(20_013, kv_heads=2)
    return heads, build(heads)


@pytest.fixture(params=kernel.supported_isas())
def tier(request):
    before = kernel.isa()
    kernel.set_isa(request.param)
    yield request.param
    kernel.set_isa(before)


def ask(index, queries, budget, scope, want_selected=True, head=0, **more):
    softcap = more.pop("softcap", 0.0)
    rows = IndexRows(queries, head, scope, budget, **more)
    return index.attend([rows], SCALE, softcap, want_selected=want_selected)[0]


def relative_error(output, expected):
    return np.linalg.norm(output - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


def recall(selected, logits, k, start):
    """Share of the true k best keys found, over all (row, head, query head)."""
    found = []
    for index in np.ndindex(*logits.shape[:3]):
        best = np.argpartition(-logits[index], k)[:k] + start
        row, head, member = index
        found.append(len(np.intersect1d(selected[row][head][member], best)) / k)
    return float(np.mean(found))


def test_recall_at_100_is_at_least_95_percent_reading_a_tenth_of_the_keys(long):
    heads, index = long
    queries = heads.queries(8)
    answer = ask(index, queries, Budget(top_k=100), Span(0, 20_013))
    _, _, logits = heads.reference(queries)
    assert recall(answer.selected, logits, 100, 0) >= 0.95
    assert answer.work.scan_fraction < 0.12
    assert 0.99 < answer.work.sketch_fraction <= 1.0


def test_a_query_head_attends_exactly_the_keys_selected_for_it(long, tier):
    heads, index = long
    queries = heads.queries(2)
    answer = ask(index, queries, Budget(top_k=50), Span(0, 20_013))
    _, _, logits = heads.reference(queries)
    for place in np.ndindex(*logits.shape[:3]):
        row, head, member = place
        ids = answer.selected[row][head][member]
        assert len(ids) == 50
        part = softmax_partial(logits[place][None, ids], heads.kv.values[head, ids])
        np.testing.assert_allclose(answer.partial.output[place], part.output[0], atol=2e-4)
        np.testing.assert_allclose(answer.partial.lse[place], part.lse[0], atol=2e-4)


def test_the_tail_estimate_brings_output_and_lse_close_to_full_attention(long, tier):
    heads, index = long
    queries = heads.queries(8)
    budget = Budget(top_k=100, tail_estimate=True)
    answer = ask(index, queries, budget, Span(0, 20_013))
    output, lse, _ = heads.reference(queries)
    error = relative_error(answer.partial.output, output)
    without = ask(index, queries, Budget(top_k=100), Span(0, 20_013))
    assert np.median(error) < 0.1
    assert np.median(error) < 0.15 * np.median(relative_error(without.partial.output, output))
    assert np.abs(answer.partial.lse - lse).max() < 0.1
    assert np.abs(answer.partial.lse - lse).mean() < 0.02


@pytest.mark.parametrize("group", [1, 3, 4])
def test_a_sharp_head_reads_few_values_and_a_diffuse_one_many(long, tier, group):
    """Values are estimated where that hardly shows: few of a sharp head's keys are attended."""
    _, index = long
    heads = Heads(20_013, kv_heads=2)  # the same, with random numbers of its own
    queries = heads.queries(6)
    budget = Budget(top_k=100, tail_estimate=True)
    attended = {}
    for factor in (1, 4, 8):
        asked = (queries * np.float32(factor))[:, :, :group]
        answer = ask(index, asked, budget, Span(0, 20_013))
        output, lse, _ = heads.reference(asked)
        assert np.median(relative_error(answer.partial.output, output)) < 0.1 / factor
        assert np.abs(answer.partial.lse - lse).max() < 0.1
        attended[factor] = answer.work.attended_fraction
    assert attended[8] < attended[4] < 0.012 < 0.02 < attended[1] < 0.1


def test_heads_of_very_different_sharpness_are_searched_together(long, tier):
    """Weights of one head relative to another's bar exceed what floats hold."""
    _, index = long
    heads = Heads(20_013, kv_heads=2)
    queries = heads.queries(3) * np.array([0.01, 1.0, 40.0, 1000.0], np.float32)[:, None]
    budget = Budget(top_k=100, tail_estimate=True)
    answer = ask(index, queries, budget, Span(0, 20_013))
    output, lse, _ = heads.reference(queries)
    assert np.median(relative_error(answer.partial.output, output)) < 0.1
    np.testing.assert_allclose(answer.partial.lse, lse, atol=0.1, rtol=1e-4)


def test_whitening_by_queries_finds_more_than_whitening_by_keys_alone():
    """RetrievalAttention, section 3.2: an index must know the queries' distribution."""
    heads = Heads(12_000, seed=3)
    queries = heads.queries(6)
    sampled_queries = heads.sample().queries
    _, _, logits = heads.reference(queries)
    found = {}
    for name, sampled in (("queries", sampled_queries), ("keys", None)):
        code = fit_sketch(heads.kv.keys[0], heads.kv.values[0], sampled, format=(2, 2))
        index = SketchIndex(heads.kv, [code])
        answer = ask(index, queries, Budget(top_k=100), Span(0, 12_000))
        found[name] = recall(answer.selected, logits, 100, 0)
    assert found["queries"] > found["keys"] + 0.02


@pytest.mark.parametrize(
    "scope",
    [Span(0, 20_013), Span(37, 20_000), Span(5_000, 15_001), Span(9_990, 10_190), Span(64, 8_192)],
    ids=str,
)
@pytest.mark.parametrize("text", ["top_k=40", "top_k=40+tail", "mass=0.9", "beta=4", "beta=4+tail"])
def test_a_scope_bounds_what_is_found_and_what_is_estimated(long, scope, text):
    heads, index = long
    queries = heads.queries(3)
    answer = ask(index, queries, Budget.parse(text), scope)
    for row in answer.selected:
        for head in row:
            for ids in head:
                assert len(np.unique(ids)) == len(ids)
                assert all(position in scope for position in ids.tolist())
    assert answer.work.keys_in_scope == 3 * 2 * len(scope)
    if "tail" in text:  # mass outside the scope would show in the lse
        _, lse, _ = heads.reference(queries, scope.start, scope.stop)
        assert np.abs(answer.partial.lse - lse).max() < 0.1


def test_positions_count_from_the_shards_start():
    heads = Heads(9_000, start=64_000)
    index = build(heads)
    answer = ask(index, heads.queries(1), Budget(top_k=10), Span(66_000, 80_000))
    for ids in answer.selected[0][0]:
        assert ids.min() >= 66_000
        assert ids.max() < 73_000
    assert answer.work.keys_in_scope == 7_000


def test_the_mass_budget_keeps_the_mass_it_was_asked_for(long):
    heads, index = long
    queries = heads.queries(4)
    answer = ask(index, queries, Budget(mass=0.5), Span(0, 20_013))
    _, lse, logits = heads.reference(queries)
    masses = []
    for place in np.ndindex(*lse.shape):
        row, head, member = place
        ids = answer.selected[row][head][member]
        masses.append(np.exp(logits[place][ids] - lse[place]).sum())
    assert min(masses) >= 0.45
    assert 0.49 <= np.mean(masses) < 0.55
    assert answer.work.attended_fraction < 0.2


def test_a_mass_that_needs_much_of_the_scope_reads_all_of_it_in_order(long):
    heads, index = long
    queries = heads.queries(1)
    answer = ask(index, queries, Budget(mass=0.999), Span(0, 20_013))
    output, lse, _ = heads.reference(queries)
    np.testing.assert_allclose(answer.partial.output, output, atol=1e-3)
    np.testing.assert_allclose(answer.partial.lse, lse, atol=1e-3)
    assert answer.work.attended_fraction == 1.0


def test_floor_and_ceiling_bound_the_mass_budget(long):
    heads, index = long
    queries = heads.queries(2)
    scope = Span(0, 20_013)
    few = ask(index, queries, Budget(mass=0.999, ceiling=25), scope)
    many = ask(index, queries, Budget(mass=0.01, floor=70), scope)
    for row in range(2):
        for member in range(4):
            assert len(few.selected[row][0][member]) <= 25
            assert len(many.selected[row][0][member]) >= 70


def test_the_beta_budget_keeps_keys_within_beta_of_the_best(long):
    heads, index = long
    queries = heads.queries(4)
    answer = ask(index, queries, Budget(beta=3.0), Span(0, 20_013))
    _, _, logits = heads.reference(queries)
    found, wanted = 0, 0
    for place in np.ndindex(*logits.shape[:3]):
        row, head, member = place
        ids = answer.selected[row][head][member]
        within = np.flatnonzero(logits[place] >= logits[place].max() - 3.0)
        assert logits[place][ids].min() >= logits[place].max() - 3.0 - 1e-3
        assert logits[place].argmax() in ids
        found, wanted = found + len(np.intersect1d(ids, within)), wanted + len(within)
    assert found / wanted > 0.9


def test_no_key_below_the_logit_floor_is_kept(long):
    heads, index = long
    queries = heads.queries(2)
    _, _, logits = heads.reference(queries)
    floor = np.sort(logits, axis=-1)[..., -30].astype(np.float32)
    floor[0, 0, 0] = 1e6
    answer = ask(index, queries, Budget(beta=50.0), Span(0, 20_013), logit_floor=floor)
    assert len(answer.selected[0][0][0]) == 0
    assert np.isneginf(answer.partial.lse[0, 0, 0])
    for place in list(np.ndindex(*floor.shape))[1:]:
        row, head, member = place
        ids = answer.selected[row][head][member]
        assert 24 <= len(ids) <= 31
        assert logits[place][ids].min() >= floor[place] - 1e-3


@pytest.mark.parametrize("text", ["top_k=60", "top_k=60+tail", "mass=0.8", "beta=2"])
def test_a_softcap_is_applied_to_found_and_estimated_keys(long, tier, text):
    heads, index = long
    queries = heads.queries(2)
    answer = ask(index, queries, Budget.parse(text), Span(0, 20_013), softcap=30.0)
    _, lse, logits = heads.reference(queries, softcap=30.0)
    ids = answer.selected[1][0][2]
    if "tail" in text:
        assert np.abs(answer.partial.lse - lse).max() < 0.1
    else:
        top = logits[1, 0, 2][ids]
        expected = np.log(np.exp(top - top.max()).sum()) + top.max()
        assert answer.partial.lse[1, 0, 2] == pytest.approx(expected, abs=1e-3)


def test_every_tier_finds_the_same_keys(long):
    heads, index = long
    queries = heads.queries(3)
    before = kernel.isa()
    answers = {}
    try:
        for isa in kernel.supported_isas():
            kernel.set_isa(isa)
            answers[isa] = ask(index, queries, Budget(top_k=64), Span(10, 20_000))
    finally:
        kernel.set_isa(before)
    expected = answers["scalar"]
    for answer in answers.values():
        np.testing.assert_allclose(answer.partial.output, expected.partial.output, atol=1e-3)
        for row, expected_row in zip(answer.selected, expected.selected, strict=True):
            for head, expected_head in zip(row, expected_row, strict=True):
                for ids, expected_ids in zip(head, expected_head, strict=True):
                    assert len(np.intersect1d(ids, expected_ids)) >= 63


def test_many_rows_are_answered_as_if_asked_one_by_one(long):
    heads, index = long
    queries = heads.queries(12)
    budget = Budget(top_k=30, tail_estimate=True)
    together = ask(index, queries, budget, Span(0, 20_013), want_selected=False)
    for row in range(12):
        alone = ask(index, queries[row : row + 1], budget, Span(0, 20_013), want_selected=False)
        np.testing.assert_array_equal(together.partial.output[row], alone.partial.output[0])
        np.testing.assert_array_equal(together.partial.lse[row], alone.partial.lse[0])


def test_the_answer_does_not_depend_on_the_number_of_threads(long):
    heads, index = long
    queries = heads.queries(6)
    before = kernel.threads()
    answers = []
    try:
        for threads in (1, 3):
            kernel.set_threads(threads)
            answers.append(ask(index, queries, Budget(top_k=80), Span(0, 20_013)))
    finally:
        kernel.set_threads(before)
    np.testing.assert_array_equal(answers[0].partial.output, answers[1].partial.output)
    assert answers[0].work == answers[1].work


@pytest.mark.parametrize("group", [1, 3, 8, 9, 17])
def test_groups_of_any_size_are_searched(group):
    heads = Heads(6_000, group=group, seed=group)
    index = build(heads)
    queries = heads.queries(2)
    answer = ask(index, queries, Budget(top_k=50, tail_estimate=True), Span(0, 6_000))
    output, lse, logits = heads.reference(queries)
    assert recall(answer.selected, logits, 50, 0) > 0.9
    assert np.median(relative_error(answer.partial.output, output)) < 0.15
    assert np.abs(answer.partial.lse - lse).max() < 0.1


@pytest.mark.parametrize("storage", [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16], ids=str)
def test_every_storage_dtype_is_served(storage):
    heads = Heads(5_000, storage=storage, value_dim=40)
    queries = heads.queries(2)
    answer = ask(build(heads), queries, Budget(top_k=100), Span(0, 5_000))
    _, _, logits = heads.reference(queries)
    assert answer.partial.output.shape == (2, 1, 4, 40)
    assert recall(answer.selected, logits, 100, 0) > 0.95


@pytest.mark.parametrize("n", [1, 15, 63, 64, 65, 1_000])
def test_short_shards_are_answered_exactly(n):
    heads = Heads(n)
    index = build(heads)
    queries = heads.queries(2)
    output, lse, _ = heads.reference(queries)
    for budget in (Budget(top_k=5_000), Budget(mass=1.0), Budget(top_k=1, tail_estimate=True)):
        answer = ask(index, queries, budget, Span(0, n))
        np.testing.assert_allclose(answer.partial.output, output, atol=2e-2)
        np.testing.assert_allclose(answer.partial.lse, lse, atol=2e-2)


def test_a_budget_of_more_keys_than_there_are_is_full_attention(long):
    heads, index = long
    queries = heads.queries(1)
    answer = ask(index, queries, Budget(top_k=1_000_000), Span(0, 20_013), want_selected=False)
    output, lse, _ = heads.reference(queries)
    np.testing.assert_allclose(answer.partial.output, output, atol=1e-3)
    np.testing.assert_allclose(answer.partial.lse, lse, atol=1e-3)


def test_an_empty_scope_gives_nothing(long):
    heads, index = long
    for budget in (Budget(top_k=3), Budget(mass=0.5, tail_estimate=True), Budget(exact=True)):
        answer = ask(index, heads.queries(1), budget, Span(30_000, 40_000))
        assert np.isneginf(answer.partial.lse).all()
        assert not answer.partial.output.any()
        assert answer.work.keys_in_scope == 0


@pytest.mark.parametrize("text", ["top_k=10", "top_k=10+tail", "mass=0.5", "beta=1"])
def test_keys_that_are_all_equal_are_still_answered(text):
    kv = LayerKv(np.ones((1, 9_000, DIM), np.float32), np.ones((1, 9_000, 8), np.float32), 0)
    control = BuildControl(progress=lambda built, total: None, cancelled=threading.Event())
    index = SketchIndex.build(kv, None, control)
    queries = np.ones((1, 1, 2, DIM), np.float32)
    answer = ask(index, queries, Budget.parse(text), Span(0, 9_000))
    np.testing.assert_allclose(answer.partial.output, 1.0, rtol=1e-5)


def test_zero_keys_and_zero_queries_are_answered(long):
    _, index = long
    zero = np.zeros((1, 2, 4, DIM), np.float32)
    answer = ask(index, zero, Budget(top_k=10, tail_estimate=True), Span(0, 20_013))
    np.testing.assert_allclose(answer.partial.lse, np.log(20_013), rtol=1e-3)
    empty = Heads(6_000)
    empty.kv.keys[0, ::2] = 0
    answer = ask(build(empty), empty.queries(1), Budget(top_k=10), Span(0, 6_000))
    assert np.isfinite(answer.partial.lse).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_keys_that_are_not_finite_are_refused_at_build(bad):
    heads = Heads(2_000, kv_heads=2)
    heads.kv.keys[1, 1_234, 5] = bad
    with pytest.raises(InvalidRequest, match=r"KV head 1: key 1234 holds NaN or infinity"):
        build(heads)


def test_queries_that_are_not_finite_are_refused(long):
    heads, index = long
    queries = heads.queries(1)
    queries[0, 0, 0, 0] = np.nan
    with pytest.raises(InvalidRequest, match="NaN"):
        ask(index, queries, Budget(top_k=3), Span(0, 20_013))


def test_a_sample_with_nan_is_not_used():
    heads = Heads(5_000)
    sample = heads.sample()
    queries = sample.queries.copy()
    queries[2, 7] = np.nan
    control = BuildControl(progress=lambda built, total: None, cancelled=threading.Event())
    broken = QuerySample(0, 0, sample.positions, queries)
    index = SketchIndex.build(heads.kv, broken, control)
    answer = ask(index, heads.queries(1), Budget(top_k=10), Span(0, 5_000))
    assert np.isfinite(answer.partial.lse).all()


def test_a_sample_of_other_heads_is_refused():
    heads = Heads(100, kv_heads=2)
    control = BuildControl(progress=lambda built, total: None, cancelled=threading.Event())
    odd = QuerySample(0, 0, np.arange(5), np.zeros((3, 5, DIM), np.float32))
    with pytest.raises(InvalidRequest, match=r"query sample has shape \(3, 5, 64\)"):
        SketchIndex.build(heads.kv, odd, control)


def test_a_cancelled_build_stops_at_the_next_kv_head():
    heads = Heads(200, kv_heads=4)
    cancelled = threading.Event()
    done = []

    def progress(built, total):
        done.append((built, total))
        if built == 2:
            cancelled.set()

    with pytest.raises(Cancelled, match="after 2 of 4 KV heads"):
        SketchIndex.build(heads.kv, None, BuildControl(progress, cancelled))
    assert done == [(1, 4), (2, 4)]


def test_the_index_takes_at_most_36_bytes_a_key_and_a_model_per_head(long):
    _, index = long
    model = 4 * (DIM * (DIM + 1) + DIM + 3 * 56)
    assert index.index_bytes <= 2 * (36 * (20_013 + 63) + model)


def test_work_is_counted_in_rows_codes_and_summaries(long):
    heads, index = long
    queries = heads.queries(2)[:, :1]
    answer = ask(index, queries, Budget(top_k=20), Span(0, 20_013))
    union = [set().union(*(ids.tolist() for ids in row[0])) for row in answer.selected]
    assert answer.work.keys_attended == sum(map(len, union))
    assert answer.work.keys_attended <= answer.work.keys_scanned
    codes = answer.work.keys_sketched * index._heads[0].key_bytes
    rows = (answer.work.keys_scanned + answer.work.keys_attended) * DIM * 2
    assert answer.work.bytes_read == codes + rows
    assert answer.work.bytes_fraction < 0.35
