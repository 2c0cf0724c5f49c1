"""Sliding window with gaps: a static baseline (the "dilated" row of MInference 1.0, section 4).

The kept positions are multiples of `interval`, the same for every row, so that a query block can
gather them once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.patterns.base import KEY_BLOCK, PATTERNS, Pattern, Selection, diagonal_blocks


def spaced_columns(rows: int, start: int, reach: int, interval: int) -> Tensor:
    """Multiples of `interval` in the `reach` tokens before each query block of KEY_BLOCK rows.

    int64 [query blocks, reach // interval], ascending, padded with -1 at the front.
    """
    first_row = start + torch.arange(-(-rows // KEY_BLOCK)) * KEY_BLOCK
    last = (first_row - 1).div(interval, rounding_mode="floor") * interval
    back = torch.arange(reach // interval - 1, -1, -1) * interval
    return (last[:, None] - back).clamp(min=-1)


@PATTERNS.register("dilated")
class Dilated(Pattern):
    """The first `sink_tokens`, each row's own block, and every `interval`-th of the
    `window_tokens` before it."""

    name = "dilated"

    def __init__(
        self, sink_tokens: int = 1024, window_tokens: int = 8192, interval: int = 2
    ) -> None:
        self.sink_tokens = sink_tokens
        self.window_tokens = window_tokens
        self.interval = interval

    def select(
        self, q: Tensor, k: Tensor, start: int, total: int, scale: float, state: object
    ) -> Selection | None:
        """Independent of the input."""
        blocks = diagonal_blocks(q.shape[1], start, KEY_BLOCK)
        blocks[:, : -(-self.sink_tokens // KEY_BLOCK)] = True
        columns = spaced_columns(q.shape[1], start, self.window_tokens, self.interval)
        return Selection(
            blocks.expand(q.shape[0], -1, -1).clone().to(q.device),
            columns=columns.expand(q.shape[0], -1, -1).to(q.device),
        )
