"""The sketch's code kernels, in every tier, against NumPy on unpacked codes."""

from __future__ import annotations

import numpy as np
import pytest
import retrieval_node._native as _native

from retrieval_node import kernel

FORMATS = ((2, 4), (2, 6), (2, 2), (0, 8), (4, 0), (9, 1), (1, 20))


@pytest.fixture(params=kernel.supported_isas())
def tier(request):
    before = kernel.isa()
    kernel.set_isa(request.param)
    yield request.param
    kernel.set_isa(before)


def packed(levels, eight, four):
    """Codes of levels [n, 4 * eight + 8 * four], n a multiple of 16, as documented."""
    n = len(levels)
    lines = np.zeros((n // 16, eight + four, 16, 4), np.uint8)
    for line in range(eight):
        part = levels[:, 4 * line : 4 * line + 4]
        lines[:, line] = part.reshape(n // 16, 16, 4)
    for line in range(four):
        part = levels[:, 4 * eight + 8 * line : 4 * eight + 8 * line + 8]
        both = part[:, :4] | part[:, 4:] << 4
        lines[:, eight + line] = both.reshape(n // 16, 16, 4)
    return lines.ravel()


def random_codes(rng, n, eight, four):
    coarse = np.arange(4 * eight + 8 * four) >= 4 * eight
    return rng.integers(0, np.where(coarse, 16, 256), (n, len(coarse))).astype(np.uint8)


def expected_scores(levels, weights, eight):
    unit = np.where(np.arange(levels.shape[1]) >= 4 * eight, 16, 1)
    return (weights.astype(np.int64) * unit) @ levels.T.astype(np.int64)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("heads", range(1, 9))
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "usual"])
def test_a_scan_finds_exactly_the_codes_above_a_threshold(tier, format, heads, largest):
    eight, four = format
    rng = np.random.default_rng(heads)
    n = 320
    levels = random_codes(rng, n, eight, four)
    weights = rng.integers(-127, 128, (heads, levels.shape[1])).astype(np.int8)
    if largest:  # the largest sums possible, where 16-bit arithmetic would saturate
        weights[0] = 127
    levels[3] = np.where(np.arange(levels.shape[1]) >= 4 * eight, 15, 255)
    scores = expected_scores(levels, weights, eight)
    thresholds = np.quantile(scores, 0.9, axis=1).astype(np.int32)
    ids, found_scores = np.empty(n, np.int32), np.empty(n * heads, np.int32)
    sums = np.full((n // 64, 8), np.nan, np.float32)
    slope = np.full(heads, 1e-4, np.float32)
    offset = rng.standard_normal(heads).astype(np.float32)
    reference = (thresholds * slope + offset).astype(np.float32)
    count = _native.scan_codes(
        packed(levels, eight, four),
        eight,
        four,
        weights.view(np.int32),
        thresholds,
        ids,
        found_scores,
        (slope, offset, reference, 0.0),
        sums,
    )
    hit = (scores > thresholds[:, None]).any(axis=0)
    np.testing.assert_array_equal(ids[:count], np.flatnonzero(hit))
    np.testing.assert_array_equal(found_scores.reshape(heads, n)[:, :count], scores[:, hit])
    tail = np.exp(scores * slope[:, None] + (offset - reference)[:, None], dtype=np.float64)
    expected = np.where(hit, 0, tail).reshape(heads, n // 64, 64).sum(axis=2).T
    np.testing.assert_allclose(sums[:, :heads], expected, rtol=2e-4)


def test_the_tail_respects_the_softcap(tier):
    rng = np.random.default_rng(1)
    levels = random_codes(rng, 64, 2, 4)
    weights = rng.integers(-127, 128, (1, 40)).astype(np.int8)
    scores = expected_scores(levels, weights, 2)
    ids, found, sums = np.empty(64, np.int32), np.empty(64, np.int32), np.zeros((1, 8), np.float32)
    slope, offset, reference = (np.array([x], np.float32) for x in (2e-3, 0.5, 3.0))
    nothing_hits = np.array([2**31 - 1], np.int32)
    _native.scan_codes(
        packed(levels, 2, 4),
        2,
        4,
        weights.view(np.int32),
        nothing_hits,
        ids,
        found,
        (slope, offset, reference, 4.0),
        sums,
    )
    logits = 4.0 * np.tanh((scores[0] * 2e-3 + 0.5) / 4.0)
    np.testing.assert_allclose(sums[0, 0], np.exp(logits - 3.0).sum(), rtol=1e-4)


@pytest.mark.parametrize("n", [1, 15, 64, 127, 128, 129, 1000, 8592])
@pytest.mark.parametrize("distinct", [2, 30, 2**32 - 1], ids="{} values".format)
def test_the_nth_highest_score_is_that_of_a_sorted_list(tier, n, distinct):
    rng = np.random.default_rng(n)
    scores = (rng.integers(0, distinct, n) - 2**31).astype(np.int32)
    highest = np.sort(scores)[::-1]
    for wanted in {1, 2, 16, 63, 64} & set(range(n + 1)):
        assert _native.nth_highest(scores, wanted) == highest[wanted - 1]


@pytest.mark.parametrize("wanted", [0, 65, 101])
def test_more_of_the_highest_than_there_can_be_are_refused(tier, wanted):
    scores = np.zeros(100 if wanted > 100 else 200, np.int32)
    with pytest.raises(ValueError, match="wanted must be 1 to 64"):
        _native.nth_highest(scores, wanted)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 63, 64, 65, 200])
@pytest.mark.parametrize("dims", [(40, 24), (13, 7)], ids=str)
def test_encoding_rounds_and_clips_every_dimension(tier, n, dims):
    head_dim, value_dim = dims
    rng = np.random.default_rng(n)
    eight, four = 2, 3
    keys = rng.standard_normal((n, head_dim), np.float32)
    values = rng.standard_normal((n, value_dim), np.float32)
    weights = 40 * rng.standard_normal((32, head_dim), np.float32)
    weights[8:] /= 12
    bias = np.where(np.arange(32) < 8, 128.5, 8.5).astype(np.float32)
    codes, summaries = kernel.encode_sketch(keys, values, eight, four, weights, bias)
    exact = keys @ weights.T + bias
    levels = np.floor(exact.clip(0, np.where(np.arange(32) < 8, 255, 15))).astype(np.uint8)
    levels = np.pad(levels, ((0, -n % 16), (0, 0)))
    edge = np.abs(exact - np.rint(exact)) < 1e-3  # rounding may go either way there
    expected = packed(levels, eight, four)
    if not edge.any():
        np.testing.assert_array_equal(codes, expected)
    else:
        assert (codes != expected).sum() <= edge.sum()
    blocks = [values[i : i + 64].mean(axis=0) for i in range(0, n, 64)]
    stored = (summaries.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(stored, blocks, atol=4e-3 * np.abs(values).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_encoding_names_the_first_key_that_is_not_finite(tier, bad):
    keys = np.zeros((100, 16), np.float32)
    keys[77, 3] = bad
    with pytest.raises(ValueError, match="key 77 holds NaN or infinity"):
        kernel.encode_sketch(
            keys, keys, 2, 0, np.zeros((8, 16), np.float32), np.zeros(8, np.float32)
        )
