"""A-shape (MInference 1.0, section 3.1; StreamingLLM): sink tokens and a sliding window, static."""

from __future__ import annotations

from torch import Tensor

from gpu_worker.patterns.base import KEY_BLOCK, PATTERNS, Pattern, Selection, diagonal_blocks


@PATTERNS.register("a_shape")
class AShape(Pattern):
    """The first `sink_tokens` and the `window_tokens` before each row, in whole blocks."""

    name = "a_shape"

    def __init__(self, sink_tokens: int = 1024, window_tokens: int = 4096) -> None:
        self.sink_tokens = sink_tokens
        self.window_tokens = window_tokens

    def select(
        self, q: Tensor, k: Tensor, start: int, total: int, scale: float, state: object
    ) -> Selection | None:
        """Independent of the input."""
        blocks = diagonal_blocks(q.shape[1], start, KEY_BLOCK, self.window_tokens)
        blocks[:, : -(-self.sink_tokens // KEY_BLOCK)] = True
        return Selection(blocks.expand(q.shape[0], -1, -1).clone())
