"""The algebra of partial attention, against attention computed in float64 by its definition."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.attention import (
    attention_logits,
    empty_partial,
    merge,
    partial_attention,
    softmax_partial,
)
from longreach.types import BFLOAT16, PartialAttention


def defined_attention(queries, keys, values, scale, softcap=0.0, keep=None):
    """Output and lse in float64, one query head at a time, straight from the definition."""
    rows, q_heads, _ = queries.shape
    group = q_heads // keys.shape[0]
    output = np.zeros((rows, q_heads, values.shape[-1]))
    lse = np.full((rows, q_heads), -np.inf)
    for row in range(rows):
        for head in range(q_heads):
            logits = [
                scale * math.fsum(queries[row, head].astype(float) * key.astype(float))
                for key in keys[head // group]
            ]
            if softcap:
                logits = [softcap * math.tanh(z / softcap) for z in logits]
            kept = [i for i in range(len(logits)) if keep is None or keep[row, head, i]]
            if not kept:
                continue
            highest = max(logits[i] for i in kept)
            weights = {i: math.exp(logits[i] - highest) for i in kept}
            total = math.fsum(weights.values())
            lse[row, head] = highest + math.log(total)
            for i, weight in weights.items():
                output[row, head] += weight / total * values[head // group, i].astype(float)
    return output, lse


def random_case(seed, rows=2, kv_heads=2, group=3, n=23, dim=8, value_dim=5, spread=1.0):
    rng = np.random.default_rng(seed)
    return (
        (spread * rng.standard_normal((rows, kv_heads * group, dim))).astype(np.float32),
        rng.standard_normal((kv_heads, n, dim)).astype(np.float32),
        rng.standard_normal((kv_heads, n, value_dim)).astype(np.float32),
    )


def assert_close(part: PartialAttention, output, lse, tolerance=2e-5):
    np.testing.assert_allclose(part.output, output, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(part.lse, lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("group", [1, 3])
def test_exact_attention_is_attention_by_definition(softcap, group):
    queries, keys, values = random_case(1, group=group, spread=3.0)
    part = partial_attention(queries, keys, values, 0.4, softcap)
    assert part.output.dtype == part.lse.dtype == np.float32
    assert_close(part, *defined_attention(queries, keys, values, 0.4, softcap))


def test_keys_that_are_not_kept_do_not_count():
    queries, keys, values = random_case(2)
    keep = np.random.default_rng(3).random((2, 6, 23)) < 0.4
    keep[1, 2] = False
    part = partial_attention(queries, keys, values, 0.4, keep=keep)
    assert_close(part, *defined_attention(queries, keys, values, 0.4, keep=keep))
    assert part.lse[1, 2] == -np.inf
    assert not part.output[1, 2].any()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(0, 23), max_size=5),
    softcap=st.sampled_from([0.0, 2.0]),
)
def test_merging_any_split_of_the_keys_gives_full_attention(seed, cuts, softcap):
    queries, keys, values = random_case(seed)
    edges = [0, *sorted(cuts), 23]
    parts = [
        partial_attention(queries, keys[:, a:b], values[:, a:b], 0.35, softcap)
        for a, b in itertools.pairwise(edges)
    ]
    assert_close(merge(parts), *defined_attention(queries, keys, values, 0.35, softcap))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), owners=st.lists(st.integers(0, 3), min_size=23, max_size=23))
def test_merging_scattered_scopes_gives_full_attention(seed, owners):
    queries, keys, values = random_case(seed)
    owner = np.array(owners)
    parts = [
        partial_attention(queries, keys, values, 0.35, keep=(owner == part)[None, None])
        for part in range(4)
    ]
    assert_close(merge(parts), *defined_attention(queries, keys, values, 0.35))


@given(seed=st.integers(0, 2**31), order=st.permutations(range(4)))
@settings(deadline=None, max_examples=25)
def test_the_order_and_grouping_of_merges_do_not_matter(seed, order):
    queries, keys, values = random_case(seed, n=16)
    parts = [partial_attention(queries, keys[:, i::4], values[:, i::4], 0.35) for i in range(4)]
    at_once = merge(parts)
    a, b, c, d = (parts[i] for i in order)
    assert_close(merge([merge([a, b]), merge([c, d])]), at_once.output, at_once.lse)
    assert_close(merge([merge([merge([d, c]), b]), a]), at_once.output, at_once.lse)


def test_an_empty_part_changes_nothing():
    queries, keys, values = random_case(4)
    part = partial_attention(queries, keys, values, 0.4)
    nothing = empty_partial((2, 6), 5)
    merged = merge([nothing, part, nothing])
    np.testing.assert_array_equal(merged.output, part.output)
    np.testing.assert_array_equal(merged.lse, part.lse)


def test_merging_only_empty_parts_is_empty_and_never_nan():
    merged = merge([empty_partial((2, 3), 4), empty_partial((2, 3), 4)])
    assert (merged.lse == -np.inf).all()
    assert (merged.output == 0).all()


def test_rows_are_merged_apart_when_only_some_saw_keys():
    queries, keys, values = random_case(5)
    keep = np.ones((2, 6, 23), bool)
    keep[0] = False
    some = partial_attention(queries, keys[:, :9], values[:, :9], 0.4, keep=keep[:, :, :9])
    rest = partial_attention(queries, keys[:, 9:], values[:, 9:], 0.4, keep=keep[:, :, 9:])
    assert_close(merge([some, rest]), *defined_attention(queries, keys, values, 0.4, keep=keep))


def test_attention_over_no_keys_is_the_empty_partial():
    queries, keys, values = random_case(6, n=0)
    part = partial_attention(queries, keys, values, 0.4)
    expected = empty_partial((2, 6), 5)
    np.testing.assert_array_equal(part.output, expected.output)
    np.testing.assert_array_equal(part.lse, expected.lse)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_logits_far_from_zero_neither_overflow_nor_vanish(offset):
    logits = np.array([[offset, offset + 1, offset - 2]], np.float32)
    values = np.eye(3, dtype=np.float32)
    whole = softmax_partial(logits, values)
    weights = np.exp([-1.0, 0.0, -3.0]) / np.exp([-1.0, 0.0, -3.0]).sum()
    np.testing.assert_allclose(whole.output[0], weights, rtol=1e-5)
    split = merge(
        [softmax_partial(logits[:, :1], values[:1]), softmax_partial(logits[:, 1:], values[1:])]
    )
    np.testing.assert_allclose(split.output, whole.output, rtol=1e-3)
    np.testing.assert_allclose(split.lse, whole.lse, rtol=1e-6)


def test_a_softcap_bounds_the_logits():
    queries, keys, _ = random_case(7, spread=100.0)
    logits = attention_logits(queries[:, :2], keys, 1.0, softcap=5.0)
    plain = attention_logits(queries[:, :2], keys, 1.0)
    assert np.abs(plain).max() > 50
    assert np.abs(logits).max() <= 5.0
    np.testing.assert_allclose(logits, 5 * np.tanh(plain / 5), rtol=1e-5)


def test_sixteen_bit_keys_are_attended_in_fp32():
    queries, keys, values = random_case(8)
    half = [array.astype(BFLOAT16) for array in (queries, keys, values)]
    part = partial_attention(*half, 0.4)
    assert part.output.dtype == np.float32
    assert_close(part, *defined_attention(*half, 0.4))
