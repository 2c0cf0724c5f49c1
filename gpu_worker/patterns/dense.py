"""Dense attention: the reference row, and what short prompts get."""

from __future__ import annotations

from torch import Tensor

from gpu_worker.patterns.base import PATTERNS, Pattern, Selection


@PATTERNS.register("dense")
class Dense(Pattern):
    """Every earlier key."""

    name = "dense"

    def select(
        self, q: Tensor, k: Tensor, start: int, total: int, scale: float, state: object
    ) -> Selection | None:
        """Nothing is left out."""
        return None
