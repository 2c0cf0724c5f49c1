"""Window and strides: a static baseline (the "strided" row of MInference 1.0, section 4; Sparse
Transformers, arXiv 1904.10509, section 4.2)."""

from __future__ import annotations

from torch import Tensor

from gpu_worker.patterns.base import KEY_BLOCK, PATTERNS, Pattern, Selection, diagonal_blocks
from gpu_worker.patterns.dilated import spaced_columns


@PATTERNS.register("strided")
class Strided(Pattern):
    """The first `sink_tokens`, the `window_tokens` before each row in whole blocks, and before
    those every `interval`-th position as far back as `reach_tokens`."""

    name = "strided"

    def __init__(
        self,
        sink_tokens: int = 1024,
        window_tokens: int = 2048,
        reach_tokens: int = 16_384,
        interval: int = 8,
    ) -> None:
        self.sink_tokens = sink_tokens
        self.window_tokens = window_tokens
        self.reach_tokens = reach_tokens
        self.interval = interval

    def select(
        self, q: Tensor, k: Tensor, start: int, total: int, scale: float, state: object
    ) -> Selection | None:
        """Independent of the input; positions inside the window count once."""
        blocks = diagonal_blocks(q.shape[1], start, KEY_BLOCK, self.window_tokens)
        blocks[:, : -(-self.sink_tokens // KEY_BLOCK)] = True
        columns = spaced_columns(q.shape[1], start, self.reach_tokens, self.interval)
        return Selection(
            blocks.expand(q.shape[0], -1, -1).clone().to(q.device),
            columns=columns.expand(q.shape[0], -1, -1).to(q.device),
        )
