"""Block-sparse (MInference 1.0, algorithm 3): key blocks by the product of mean-pooled Q and K."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.patterns.base import (
    KEY_BLOCK,
    PATTERNS,
    Pattern,
    Selection,
    block_grid,
    diagonal_blocks,
)

_POOL_BYTES = 2 << 20
"""Pooled at once: what is converted to fp32 stays in a core's cache."""


def pool_blocks(x: Tensor, block: int) -> Tensor:
    """Mean over runs of `block` tokens, fp32: x [heads, n, d] → [heads, ceil(n / block), d]."""
    heads, n, d = x.shape
    blocks = -(-n // block)
    pooled = torch.empty(heads, blocks, d, device=x.device)
    step = blocks if x.is_cuda else max(1, _POOL_BYTES // (4 * block * d))
    for head in range(heads):
        for low in range(0, n // block, step):
            high = min(n // block, low + step)
            runs = x[head, low * block : high * block].float().unflatten(0, (-1, block))
            torch.mean(runs, 1, out=pooled[head, low:high])
        if n % block:
            pooled[head, -1] = x[head, n // block * block :].float().mean(0)
    return pooled


@PATTERNS.register("block_sparse")
class BlockSparse(Pattern):
    """The `top_blocks` key blocks with the highest pooled score, and the diagonal."""

    name = "block_sparse"

    def __init__(self, top_blocks: int = 100) -> None:
        self.top_blocks = top_blocks

    def select(
        self, q: Tensor, k: Tensor, start: int, total: int, scale: float, state: object
    ) -> Selection | None:
        """Per query block of KEY_BLOCK rows."""
        rows = q.shape[1]
        _, key_blocks, causal = block_grid(rows, start, KEY_BLOCK)
        pooled_k = pool_blocks(k, KEY_BLOCK).repeat_interleave(q.shape[0] // k.shape[0], 0)
        scores = pool_blocks(q, KEY_BLOCK) @ pooled_k.transpose(1, 2) * scale
        causal = causal.to(q.device)
        scores = scores.masked_fill(~causal, -torch.inf)
        best = scores.topk(min(self.top_blocks, key_blocks), dim=-1).indices
        blocks = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        return Selection((blocks | diagonal_blocks(rows, start, KEY_BLOCK).to(q.device)) & causal)
