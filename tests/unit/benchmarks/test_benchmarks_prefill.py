"""The prefill benchmark measures chunks that stand for all of them."""

from __future__ import annotations

import pytest

from benchmarks.prefill import CHUNK_ROWS, sampled_chunks


@pytest.mark.parametrize("n", [1, CHUNK_ROWS, 5000, 32_768, 131_072])
@pytest.mark.parametrize("chunks", [1, 2, 4, 8, 100])
def test_the_chunks_measured_stand_for_all_chunks(n: int, chunks: int) -> None:
    sampled = sampled_chunks(n, chunks)
    total = -(-n // CHUNK_ROWS)
    assert sum(count for _, count in sampled) == total
    assert len(sampled) <= max(2, chunks)
    starts = [start for start, _ in sampled]
    assert starts == sorted(set(starts))
    # The last chunk holds rows that are attended densely: it stands for no other.
    assert sampled[-1] == ((total - 1) * CHUNK_ROWS, 1)


def test_all_chunks_are_measured_where_there_are_few() -> None:
    assert sampled_chunks(4 * CHUNK_ROWS, 8) == [(i * CHUNK_ROWS, 1) for i in range(4)]
