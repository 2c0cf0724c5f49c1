"""Block-sparse (MInference 1.0, algorithm 3): key blocks by the product of mean-pooled Q and K."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.patterns.base import (
    KEY_BLOCK,
    PATTERNS,
    Pattern,
    Selection,
    block_grid,
    diagonal_blocks,
)


def pool_blocks(x: Tensor, block: int) -> Tensor:
    """Mean over runs of `block` tokens, fp32: x [heads, n, d] → [heads, ceil(n / block), d]."""
    heads, n, d = x.shape
    blocks = -(-n // block)
    padded = functional.pad(x.float(), (0, 0, 0, blocks * block - n))
    sizes = torch.full((blocks,), float(block), device=x.device)
    sizes[-1] = n - (blocks - 1) * block
    return padded.view(heads, blocks, block, d).sum(2) / sizes[:, None]


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
