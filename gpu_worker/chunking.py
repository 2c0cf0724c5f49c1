"""How a prefill is cut: the size of its chunks and which of its queries are sampled."""

from __future__ import annotations

import numpy as np

from longreach.types import IntArray

MIN_CHUNK_TOKENS = 128
"""Chunks are multiples of this, the largest query block of a sparse pattern, so that selections do
not depend on how a prompt was cut."""


class ChunkSizer:
    """Sizes prefill chunks by the time they took.

    A chunk holds the device, so while other sessions decode it should last no longer than
    `shared_target_s`; alone, `alone_target_s` bounds how long a new session or a cancellation
    waits. The cost of a chunk grows with the prefix it attends, so the size follows the last
    measured tokens per second and at most doubles from chunk to chunk.
    """

    def __init__(
        self,
        max_tokens: int,
        *,
        shared_target_s: float = 0.05,
        alone_target_s: float = 0.5,
    ) -> None:
        self._max_tokens = max(MIN_CHUNK_TOKENS, max_tokens)
        self._targets = {True: shared_target_s, False: alone_target_s}
        self._tokens_per_s = 0.0
        self._last = min(self._max_tokens, 512)

    def next_tokens(self, shared: bool) -> int:
        """Tokens for the next chunk; `shared` says whether other sessions are decoding."""
        if self._tokens_per_s:
            wanted = int(self._tokens_per_s * self._targets[shared])
            wanted = min(wanted, 2 * self._last)
        else:
            wanted = self._last
        bounded = max(MIN_CHUNK_TOKENS, min(wanted, self._max_tokens))
        return min(bounded // MIN_CHUNK_TOKENS * MIN_CHUNK_TOKENS, self._max_tokens)

    def took(self, tokens: int, seconds: float) -> None:
        """Reports a chunk that ran."""
        self._last = max(tokens, MIN_CHUNK_TOKENS)
        self._tokens_per_s = tokens / max(seconds, 1e-9)


class FixedChunks(ChunkSizer):
    """Chunks of one size: the same cuts on every run, hence the same bits."""

    def next_tokens(self, shared: bool) -> int:
        """The fixed size."""
        return self._max_tokens


def sample_positions(tokens: int, limit: int = 2048) -> IntArray:
    """Positions whose queries are kept for attention-aware indexes, ascending.

    One in eight positions up to `limit`: half of them spread over everything, a quarter over the
    last eighth and a quarter at the very end, because decode queries resemble the last ones.
    """
    wanted = min(limit, max(min(tokens, 64), tokens // 8))
    if wanted >= tokens:
        return np.arange(tokens)
    half, quarter = wanted - 2 * (wanted // 4), wanted // 4
    spread = np.linspace(0, tokens - 1, half).astype(np.int64)
    late = np.linspace(tokens - tokens // 8, tokens - 1, quarter).astype(np.int64)
    last = np.arange(tokens - quarter, tokens)
    return np.unique(np.concatenate([spread, late, last]))
