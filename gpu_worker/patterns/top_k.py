"""Every row's own best keys, exactly: what a selection of single pairs could reach at best.

A reference row for tables, not a way to save time: all logits are computed to choose from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.patterns.base import PATTERNS, Pattern, Selection


@PATTERNS.register("top_k")
class TopK(Pattern):
    """The `keys` highest logits of each row among its causal keys."""

    name = "top_k"

    def __init__(self, keys: int = 1024) -> None:
        self.keys = keys

    def select(
        self, q: Tensor, k: Tensor, start: int, total: int, scale: float, state: object
    ) -> Selection | None:
        """All logits of one head at a time."""
        q_heads, rows, _ = q.shape
        stop = start + rows
        if stop <= self.keys:
            return None
        group = q_heads // k.shape[0]
        pairs = torch.empty(q_heads, rows, stop, dtype=torch.bool, device=q.device)
        positions = torch.arange(start, stop, device=q.device)[:, None]
        later = torch.arange(stop, device=q.device) > positions
        for head in range(q_heads):
            logits = q[head].float() @ k[head // group].float().T
            logits.masked_fill_(later, -torch.inf)
            best = logits.topk(self.keys, dim=-1).indices
            pairs[head] = torch.zeros_like(later).scatter_(1, best, True) & ~later
        return Selection.of_pairs(pairs)
