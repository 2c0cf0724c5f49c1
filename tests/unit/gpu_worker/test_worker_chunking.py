"""Chunks take the time they may; samples lie everywhere and mostly at the end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.chunking import MIN_CHUNK_TOKENS, ChunkSizer, FixedChunks, sample_positions


def settle(sizer: ChunkSizer, tokens_per_s: float, shared: bool) -> int:
    for _ in range(20):
        tokens = sizer.next_tokens(shared)
        sizer.took(tokens, tokens / tokens_per_s)
    return sizer.next_tokens(shared)


def test_chunks_settle_at_the_time_they_may_take() -> None:
    sizer = ChunkSizer(4096)
    assert settle(sizer, 10_000, shared=True) == 384  # 50 ms, whole blocks of 128
    assert settle(sizer, 10_000, shared=False) == 4096  # 500 ms would be more
    assert settle(sizer, 1_000, shared=False) == 384
    assert settle(sizer, 1, shared=True) == MIN_CHUNK_TOKENS


def test_chunks_shrink_at_once_and_grow_by_doubling() -> None:
    sizer = ChunkSizer(8192)
    settle(sizer, 100_000, shared=False)
    assert sizer.next_tokens(shared=False) == 8192
    assert sizer.next_tokens(shared=True) == 4992
    sizer.took(4992, 1.0)
    assert sizer.next_tokens(shared=True) == 128
    sizer.took(128, 128 / 1e6)
    assert sizer.next_tokens(shared=True) == 256


def test_fixed_chunks_ignore_time() -> None:
    sizer = FixedChunks(320)
    assert settle(sizer, 10, shared=True) == 320


@given(st.integers(1, 200_000))
def test_samples_are_distinct_positions_of_the_prompt(tokens: int) -> None:
    positions = sample_positions(tokens)
    assert (np.diff(positions) > 0).all()
    assert positions[0] >= 0
    assert positions[-1] == tokens - 1
    assert len(positions) <= 2048


@pytest.mark.parametrize("tokens", [20_000, 131_072])
def test_samples_are_biased_to_the_tail_and_leave_no_large_gap(tokens: int) -> None:
    positions = sample_positions(tokens)
    assert len(positions) > 1800
    assert (positions >= tokens - tokens // 8).mean() > 0.5
    assert np.diff(positions).max() <= tokens / 1000


def test_short_prompts_are_sampled_whole() -> None:
    assert sample_positions(40).tolist() == list(range(40))
