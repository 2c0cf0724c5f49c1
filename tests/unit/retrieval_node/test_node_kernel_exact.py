"""Every instruction-set tier against the NumPy specification of attention."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from longreach.attention import merge, partial_attention
from longreach.types import Budget, PartialAttention
from retrieval_node import kernel
from retrieval_node.kernel import KernelRows, KvRows

STORAGES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
# (head_dim, value_dim, kv_heads, group, rows, keys): the usual head sizes, ragged ones, group sizes
# that fill a tile or do not, and enough rows for the panel path.
SHAPES = (
    (64, 64, 2, 4, 1, 500),
    (80, 80, 2, 1, 3, 130),
    (96, 64, 1, 8, 2, 257),
    (128, 128, 2, 7, 1, 300),
    (256, 256, 1, 2, 2, 129),
    (128, 128, 1, 4, 40, 260),
    (13, 9, 2, 3, 1, 33),
    (20, 40, 1, 5, 30, 70),
)


@pytest.fixture(params=kernel.supported_isas())
def tier(request):
    before = kernel.isa()
    kernel.set_isa(request.param)
    yield request.param
    kernel.set_isa(before)


def random_kv(rng, heads, n, head_dim, value_dim, storage):
    keys = rng.standard_normal((heads, n, head_dim), np.float32).astype(storage)
    values = rng.standard_normal((heads, n, value_dim), np.float32).astype(storage)
    return keys, values


def reference(queries, keys, values, start, stop, scale, softcap=0.0):
    rows, heads, group, dim = queries.shape
    part = partial_attention(
        queries.reshape(rows, heads * group, dim),
        keys[:, start:stop],
        values[:, start:stop],
        scale,
        softcap,
    )
    return PartialAttention(
        part.output.reshape(rows, heads, group, -1), part.lse.reshape(rows, heads, group)
    )


def assert_close(part, expected, tolerance=2e-5):
    np.testing.assert_allclose(part.output, expected.output, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(part.lse, expected.lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("storage", STORAGES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_exact_attention_equals_the_specification(tier, storage, shape, softcap):
    head_dim, value_dim, heads, group, rows, n = shape
    rng = np.random.default_rng(1)
    keys, values = random_kv(rng, heads, n, head_dim, value_dim, storage)
    queries = rng.standard_normal((rows, heads, group, head_dim), np.float32)
    scale = head_dim**-0.5
    [part] = kernel.attend_exact(keys, values, [KernelRows(queries, 0, 3, n - 2)], scale, softcap)
    assert_close(part, reference(queries, keys, values, 3, n - 2, scale, softcap))


def test_bfloat16_queries_lose_nothing_in_the_bfloat16_path(tier):
    rng = np.random.default_rng(2)
    keys, values = random_kv(rng, 1, 400, 128, 128, STORAGES[2])
    queries = rng.standard_normal((1, 1, 4, 128), np.float32)
    rounded = queries.astype(ml_dtypes.bfloat16).astype(np.float32)
    [part] = kernel.attend_exact(keys, values, [KernelRows(rounded, 0, 0, 400)], 0.1)
    assert_close(part, reference(rounded, keys, values, 0, 400, 0.1), 5e-6)


def test_heads_and_scopes_of_a_batch_are_independent(tier):
    rng = np.random.default_rng(3)
    keys, values = random_kv(rng, 4, 200, 64, 32, STORAGES[0])
    batch = [
        KernelRows(rng.standard_normal((2, 2, 3, 64), np.float32), 1, 10, 150),
        KernelRows(rng.standard_normal((1, 4, 1, 64), np.float32), 0, 0, 200),
        KernelRows(rng.standard_normal((5, 1, 6, 64), np.float32), 3, 199, 200),
    ]
    for rows, part in zip(batch, kernel.attend_exact(keys, values, batch, 0.2), strict=True):
        stop = rows.kv_head_start + rows.queries.shape[1]
        heads = slice(rows.kv_head_start, stop)
        expected = reference(rows.queries, keys[heads], values[heads], rows.start, rows.stop, 0.2)
        assert_close(part, expected)


def pairs_of_many_kinds(rng):
    """K/V pairs that differ in length, heads, dimensions and storage, with rows for each."""
    shapes = ((64, 64, 2, 4, 1, 5_000), (80, 48, 1, 3, 2, 1), (128, 128, 2, 2, 40, 300))
    pairs = []
    for (head_dim, value_dim, heads, group, rows, n), storage in zip(shapes, STORAGES, strict=True):
        keys, values = random_kv(rng, heads, n, head_dim, value_dim, storage)
        queries = rng.standard_normal((rows, heads, group, head_dim), np.float32)
        batch = [KernelRows(queries, 0, 0, n), KernelRows(queries[:1], 0, n // 2, n)]
        pairs.append(KvRows(keys, values, batch))
    return pairs


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_pairs_of_any_shape_and_storage_are_answered_together(tier, threads, softcap):
    pairs = pairs_of_many_kinds(np.random.default_rng(10))
    before = kernel.threads()
    try:
        kernel.set_threads(threads)
        answers = kernel.attend_exact_pairs(pairs, 0.2, softcap)
    finally:
        kernel.set_threads(before)
    for pair, parts in zip(pairs, answers, strict=True):
        for rows, part in zip(pair.batch, parts, strict=True):
            args = (rows.queries, pair.keys, pair.values, rows.start, rows.stop)
            assert_close(part, reference(*args, 0.2, softcap))


def test_no_pairs_and_pairs_without_rows_give_no_answers(tier):
    keys, values = random_kv(np.random.default_rng(11), 1, 10, 64, 64, STORAGES[0])
    assert kernel.attend_exact_pairs([], 1.0) == []
    assert kernel.attend_exact_pairs([KvRows(keys, values, [])], 1.0) == [[]]


def test_a_pair_that_does_not_fit_is_refused_by_name(tier):
    keys, values = random_kv(np.random.default_rng(12), 1, 10, 64, 64, STORAGES[0])
    queries = np.zeros((1, 1, 1, 64), np.float32)
    good = KvRows(keys, values, [KernelRows(queries, 0, 0, 10)])
    bad = KvRows(keys, values, [KernelRows(queries, 0, 0, 11)])
    with pytest.raises(ValueError, match=r"scope \[0, 11\) is not within the 10 keys"):
        kernel.attend_exact_pairs([good, bad], 1.0)


def test_an_empty_scope_gives_zero_output_and_minus_infinity(tier):
    rng = np.random.default_rng(4)
    keys, values = random_kv(rng, 1, 10, 64, 64, STORAGES[1])
    queries = rng.standard_normal((2, 1, 2, 64), np.float32)
    [part] = kernel.attend_exact(keys, values, [KernelRows(queries, 0, 4, 4)], 1.0)
    assert not part.output.any()
    assert np.isneginf(part.lse).all()


def test_parts_of_a_scope_merge_into_the_whole(tier):
    rng = np.random.default_rng(5)
    keys, values = random_kv(rng, 2, 700, 128, 128, STORAGES[0])
    queries = rng.standard_normal((3, 2, 4, 128), np.float32)
    cuts = [0, 1, 130, 131, 699, 700]
    parts = [
        kernel.attend_exact(keys, values, [KernelRows(queries, 0, a, b)], 0.3)[0]
        for a, b in pairwise(cuts)
    ]
    [whole] = kernel.attend_exact(keys, values, [KernelRows(queries, 0, 0, 700)], 0.3)
    assert_close(merge(parts), whole)


def test_huge_logits_do_not_overflow(tier):
    rng = np.random.default_rng(6)
    keys, values = random_kv(rng, 1, 300, 64, 64, STORAGES[0])
    queries = 100 * rng.standard_normal((1, 1, 4, 64), np.float32)
    [part] = kernel.attend_exact(keys, values, [KernelRows(queries, 0, 0, 300)], 10.0)
    assert_close(part, reference(queries, keys, values, 0, 300, 10.0), 1e-4)


def test_nan_in_a_key_is_not_hidden(tier):
    rng = np.random.default_rng(7)
    keys, values = random_kv(rng, 1, 50, 64, 64, STORAGES[0])
    keys[0, 20, 5] = np.nan
    queries = rng.standard_normal((1, 1, 1, 64), np.float32)
    [part] = kernel.attend_exact(keys, values, [KernelRows(queries, 0, 0, 50)], 1.0)
    assert np.isnan(part.output).all()
    [clean] = kernel.attend_exact(keys, values, [KernelRows(queries, 0, 0, 20)], 1.0)
    assert np.isfinite(clean.output).all()


def test_views_with_gaps_between_rows_and_heads_are_read_in_place(tier):
    rng = np.random.default_rng(8)
    buffer = rng.standard_normal((60, 3, 2, 64), np.float32)  # [position, head, K or V, dim]
    keys, values = (buffer[:, :, i].transpose(1, 0, 2) for i in (0, 1))
    queries = rng.standard_normal((2, 3, 2, 64), np.float32)
    [part] = kernel.attend_exact(keys, values, [KernelRows(queries, 0, 5, 60)], 0.5)
    assert_close(part, reference(queries, keys, values, 5, 60, 0.5))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_queries_and_floors_need_not_be_dense_float32(dtype):
    rng = np.random.default_rng(9)
    keys, values = random_kv(rng, 3, 200, 64, 64, np.dtype(np.float32))
    queries = rng.standard_normal((2, 64, 2, 6)).astype(dtype).transpose(0, 3, 2, 1)[:, ::2]
    floor = rng.standard_normal((2, 6, 2)).astype(dtype)[:, ::2]
    dense = [np.ascontiguousarray(each, np.float32) for each in (queries, floor)]
    for budget in (Budget(exact=True), Budget(top_k=7), Budget(beta=2.0)):
        entries = [
            kernel.entry(q, 0, 0, 200, budget, lowest, 64)
            for q, lowest in ((queries, floor), dense)
        ]
        figures, _ = kernel.attend_scope(keys, values, entries, 0.5)
        np.testing.assert_array_equal(entries[0].output, entries[1].output)
        assert figures[0][:4] == figures[1][:4]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_do_not_change_from_call_to_call_with_a_given_thread_count(tier, threads):
    rng = np.random.default_rng(9)
    keys, values = random_kv(rng, 1, 9000, 32, 32, STORAGES[0])
    rows = KernelRows(rng.standard_normal((1, 1, 4, 32), np.float32), 0, 0, 9000)
    before = kernel.threads()
    try:
        kernel.set_threads(threads)
        parts = [kernel.attend_exact(keys, values, [rows], 0.5)[0] for _ in range(4)]
    finally:
        kernel.set_threads(before)
    for part in parts[1:]:
        np.testing.assert_array_equal(part.output, parts[0].output)
        np.testing.assert_array_equal(part.lse, parts[0].lse)
    assert_close(parts[0], reference(rows.queries, keys, values, 0, 9000, 0.5))
