"""Sparse prefill patterns: the executor equals the reference mask, the selections their papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.patterns import PATTERNS, adaptive, attend_chunk
from gpu_worker.patterns.adaptive import working_dtype
from gpu_worker.patterns.base import KEY_BLOCK, Pattern
from gpu_worker.patterns.reference import attend_reference, selection_mask
from gpu_worker.patterns.spec import canonical, parse_pattern
from gpu_worker.patterns.vertical_slash import VerticalSlash, diagonal_sums
from longreach.errors import InvalidRequest

SMALL: dict[str, dict[str, int | float | bool]] = {
    "dense": {},
    "a_shape": {"sink_tokens": 64, "window_tokens": 128},
    "block_sparse": {"top_blocks": 3},
    "vertical_slash": {"verticals": 40, "slashes": 120},
    "dilated": {"sink_tokens": 64, "window_tokens": 130, "interval": 3},
    "strided": {"sink_tokens": 64, "window_tokens": 70, "reach_tokens": 400, "interval": 5},
    "top_k": {"keys": 50},
    "adaptive": {"min_share": 0.01, "dense_below": 0, "dense_first_rows": 0, "dense_last_rows": 32},
}


def test_every_registered_pattern_is_in_the_matrix() -> None:
    # minference is a mixture of the others, read from a file, with tests of its own.
    assert set(SMALL) == set(PATTERNS) - {"minference"}


def make(name: str) -> Pattern:
    return PATTERNS[name](**SMALL[name])


def tensors(q_heads: int, kv_heads: int, n: int, d: int, seed: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(h, n, d, generator=g) for h in (q_heads, kv_heads, kv_heads))
    return 2 * q, k, v


def run_chunked(
    pattern: Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    n, scale = q.shape[1], q.shape[-1] ** -0.5
    state = pattern.probe(q, k, scale) if pattern.needs == "prompt" else None
    results = [
        attend_chunk(pattern, q[:, a : a + chunk], k[:, : a + chunk], v[:, : a + chunk], a, n,
                     scale, state)
        for a in range(0, n, chunk)
    ]  # fmt: skip
    return (
        torch.cat([r.output for r in results], 1),
        torch.cat([r.lse for r in results], 1),
        sum(r.pairs_attended for r in results),
    )


@pytest.mark.parametrize("name", list(SMALL))
@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 700),
    d=st.sampled_from([16, 64, 80]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    seed=st.integers(0, 99),
)
def test_the_executor_equals_the_reference_mask(
    name: str, n: int, d: int, heads: tuple[int, int], seed: int
) -> None:
    q, k, v = tensors(*heads, n, d, seed)
    pattern, scale = make(name), d**-0.5
    start = n // 2 // 128 * 128
    state = pattern.probe(q, k, scale) if pattern.needs == "prompt" else None
    selection = pattern.select(q[:, start:], k, start, n, scale, state)
    expected = attend_reference(q[:, start:], k, v, start, scale, selection)
    result = attend_chunk(pattern, q[:, start:], k, v, start, n, scale, state)
    assert torch.allclose(result.output, expected.output, atol=2e-5)
    assert torch.allclose(result.lse, expected.lse, atol=2e-5)
    assert (result.pairs_attended, result.pairs_visible) == (
        expected.pairs_attended,
        expected.pairs_visible,
    )


@pytest.mark.parametrize("name", list(SMALL))
def test_chunks_change_nothing(name: str) -> None:
    q, k, v = tensors(4, 2, 900, 32, 7)
    whole = run_chunked(make(name), q, k, v, 900)
    for chunk in (128, 256, 384):
        output, lse, pairs = run_chunked(make(name), q, k, v, chunk)
        assert torch.allclose(output, whole[0], atol=2e-5)
        assert torch.allclose(lse, whole[1], atol=2e-5)
        assert pairs == whole[2]


def literal_vertical_slash(
    pattern: VerticalSlash, q: torch.Tensor, k: torch.Tensor
) -> torch.Tensor:
    """Algorithm 2 of MInference 1.0 pair by pair, slashes widened to key blocks: one head."""
    n, d = k.shape
    p = min(64, n)
    probabilities = torch.zeros(p, n)
    for r in range(p):
        i = n - p + r
        probabilities[r, : i + 1] = torch.softmax(q[i] @ k[: i + 1].T / math.sqrt(d), -1)
    vertical = [float(probabilities[:, j].sum()) for j in range(n)]
    slash = [
        float(sum(probabilities[r, n - p + r - s] for r in range(p) if n - p + r - s >= 0))
        for s in range(n)
    ]
    forced_v, forced_s = set(range(min(30, n))), set(range(min(100, n)))
    columns = forced_v | set(
        sorted(set(range(n)) - forced_v, key=lambda j: -vertical[j])[: pattern.verticals - 30]
    )
    distances = forced_s | set(
        sorted(set(range(n)) - forced_s, key=lambda s: -slash[s])[: pattern.slashes - 100]
    )
    mask = torch.zeros(n, n, dtype=torch.bool)
    for first in range(0, n, KEY_BLOCK):
        rows = range(first, min(n, first + KEY_BLOCK))
        blocks = {
            b
            for s in distances
            for b in ((first - s) // KEY_BLOCK, (rows[-1] - s) // KEY_BLOCK)
            if b >= 0
        }
        for i in rows:
            for j in range(i + 1):
                mask[i, j] = j // KEY_BLOCK in blocks or j in columns
    return mask


def test_vertical_slash_equals_a_literal_transcription_of_the_paper() -> None:
    q, k, _ = tensors(1, 1, 450, 16, 3)
    pattern = VerticalSlash(verticals=40, slashes=120)
    state = pattern.probe(q, k, 16**-0.5)
    selection = pattern.select(q, k, 0, 450, 16**-0.5, state)
    assert torch.equal(
        selection_mask(selection, 1, 0, 450)[0], literal_vertical_slash(pattern, q[0], k[0])
    )


def test_diagonal_sums_follow_the_definition() -> None:
    a = torch.arange(15.0).view(1, 3, 5)
    expected = [a[0, 0, 2] + a[0, 1, 3] + a[0, 2, 4], a[0, 0, 1] + a[0, 1, 2] + a[0, 2, 3]]
    assert diagonal_sums(a)[0, :2].tolist() == [float(x) for x in expected]
    assert diagonal_sums(a)[0, 4] == a[0, 2, 0]


def test_adaptive_finds_planted_keys_that_a_fixed_window_misses() -> None:
    q, k, v = tensors(1, 1, 2048, 64, 5)
    q[:, 1800:], k[:, 640:704] = 0.3 * q[:, 1800:] + 1.0, k[:, 640:704] + 1.5
    pattern = PATTERNS["adaptive"](
        min_share=1 / 256, dense_below=0, dense_first_rows=0, dense_last_rows=0
    )
    selection = pattern.select(q, k, 0, 2048, 0.125, None)
    assert selection is not None
    mask = selection_mask(selection, 1, 0, 2048)[0]
    assert mask[1920:, 640:704].float().mean() > 0.9
    dense = attend_reference(q, k, v, 0, 0.125, None)
    ours = attend_chunk(pattern, q, k, v, 0, 2048, 0.125)
    window = attend_chunk(PATTERNS["a_shape"](64, 640), q, k, v, 0, 2048, 0.125)
    error = lambda r: float((r.output - dense.output)[:, 1920:].norm())
    assert ours.density < window.density
    assert error(ours) < 0.5 * error(window)


@pytest.mark.parametrize("most", [1, 64, 250])
def test_a_query_block_of_adaptive_attends_no_more_columns_than_allowed(most: int) -> None:
    q, k, _ = tensors(2, 1, 1024, 32, 8)
    pattern = PATTERNS["adaptive"](
        min_share=0.0, max_keys=most, dense_below=0, dense_first_rows=0, dense_last_rows=0
    )
    selection = pattern.select(q, k, 0, 1024, 0.3, None)
    assert selection is not None
    assert selection.columns is not None
    # The last query block starts at 896; sink and band take 128 of the keys before it.
    assert (selection.columns >= 0).sum(-1)[:, -1].tolist() == [most, most]


def test_adaptive_spends_nothing_on_a_head_that_looks_nearby() -> None:
    """Local keys have their exact part of the denominator, although far keys are only estimated."""
    q, k, _ = tensors(1, 1, 2048, 64, 9)
    angle = torch.arange(2048)[:, None] * 0.9 ** torch.arange(32)
    local = torch.cat([angle.cos(), angle.sin()], -1)
    q, k = 0.2 * q + 6 * local, 0.2 * k + 2 * local
    pattern = PATTERNS["adaptive"](
        min_share=1e-3, dense_below=0, dense_first_rows=0, dense_last_rows=0
    )
    selection = pattern.select(q, k, 0, 2048, 0.125, None)
    assert selection is not None
    assert selection.columns is not None
    truth = (q[0] @ k[0].T * 0.125).masked_fill(torch.ones(2048, 2048).triu(1) > 0, -torch.inf)
    assert float(truth.softmax(-1)[1024:, :512].sum(-1).mean()) < 0.01
    assert int((selection.columns[0, 8:] >= 0).sum()) == 0


@pytest.mark.parametrize(
    ("capability", "bits16"),
    [("DEFAULT", torch.float32), ("AVX2", torch.float32), ("AVX512", torch.bfloat16)],
)
def test_a_cpu_without_products_of_16_bit_floats_scores_in_fp32(
    monkeypatch: pytest.MonkeyPatch, capability: str, bits16: torch.dtype
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    torch.manual_seed(8)
    q, k = (torch.randn(2, 320, 64).bfloat16() for _ in range(2))
    assert working_dtype(q) == bits16
    assert working_dtype(q.float()) == torch.float32
    pattern = PATTERNS["adaptive"](
        min_share=1e-3, dense_below=0, dense_first_rows=0, dense_last_rows=0
    )
    chosen = pattern.select(q, k, 0, 320, 0.125, None).columns
    exact = pattern.select(q.float(), k.float(), 0, 320, 0.125, None).columns
    if bits16 == torch.float32:
        assert torch.equal(chosen, exact)
    assert (chosen >= 0).any()


def test_adaptive_scores_only_promising_blocks_key_by_key_and_finds_what_they_hold() -> None:
    q, k, _ = tensors(1, 1, 4096, 64, 5)
    q[:, 4000:], k[:, 1300:1304] = 0.3 * q[:, 4000:] + 1.0, k[:, 1300:1304] + 2.5
    pattern = PATTERNS["adaptive"](
        min_share=1 / 64, fine_blocks=1, least_blocks=1, dense_below=0, dense_first_rows=0,
        dense_last_rows=0,
    )  # fmt: skip
    columns = pattern.select(q, k, 0, 4096, 0.125, None).columns[0, -1]
    assert set(range(1300, 1304)) <= set(columns.tolist())
    # Of the block that holds them only its own run of keys, although its mean is high too.
    assert int((columns >= 0).sum()) < 32


def test_the_first_rows_of_a_long_prompt_are_dense_however_it_is_cut() -> None:
    q, k, _ = tensors(2, 1, 1024, 32, 6)
    pattern = PATTERNS["adaptive"](
        min_share=1.0, dense_below=0, dense_first_rows=500, dense_last_rows=0
    )
    for start, stop in ((0, 1024), (0, 256), (256, 1024)):
        chosen = pattern.select(q[:, start:stop], k[:, :stop], start, 1024, 0.2, None)
        visible = selection_mask(chosen, 2, start, stop - start)[0].sum(-1)
        rows = torch.arange(start, stop)
        # The query block that holds the last of them is dense as a whole.
        assert torch.equal(visible == rows + 1, rows < 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_of_all_keys_in_slices_or_not(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(adaptive, "_SLICE_KEYS", 100)
    q, k = torch.randn(3, 16), torch.randn(250, 16).to(dtype)
    assert torch.allclose(adaptive.products(q, k), q @ k.float().T, atol=1e-5)


def test_adaptive_is_dense_for_short_prompts_and_for_the_last_rows() -> None:
    q, k, _ = tensors(1, 1, 1000, 32, 4)
    short = PATTERNS["adaptive"](min_share=1.0, dense_below=1000, dense_first_rows=0)
    assert short.select(q, k, 0, 1000, 0.2, None) is None
    # The rule is about the prompt, not about the chunk: every chunk of a long one is sparse.
    assert short.select(q[:, :128], k[:, :128], 0, 1001, 0.2, None) is not None
    long = PATTERNS["adaptive"](
        min_share=1.0, dense_below=0, dense_first_rows=0, dense_last_rows=150
    )
    mask = selection_mask(long.select(q, k, 0, 1000, 0.2, None), 1, 0, 1000)[0]
    assert bool(mask[850:].sum(-1).eq(torch.arange(851, 1001)).all())
    assert not bool(mask[700, :700].all())


@pytest.mark.parametrize("name", list(SMALL))
def test_a_pattern_is_named_by_its_canonical_text(name: str) -> None:
    text = canonical(PATTERNS[name]())
    assert canonical(parse_pattern(text)) == text
    assert canonical(parse_pattern(name)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing", "known: .*adaptive.*vertical_slash"),
        ("adaptive:weight=3", "no parameter 'weight'.*min_share"),
        ("adaptive:min_share=much", "min_share is 'much'.*float"),
        ("dense:mass=1", "it has none"),
    ],
)
def test_a_wrong_pattern_text_says_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        parse_pattern(text)


def test_pattern_parameters_are_taken_from_the_text() -> None:
    pattern = parse_pattern("adaptive:min_share=0.5,mean_correction=false,key_pool=16")
    assert "min_share=0.5" in canonical(pattern)
    assert "mean_correction=False" in canonical(pattern)
    assert "key_pool=16" in canonical(pattern)
