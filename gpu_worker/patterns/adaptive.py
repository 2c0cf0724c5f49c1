"""Our own selection: per query block, by mass, with pruned blocks kept as their means.

Where the published vertical-slash selects once from 64 probe queries, this selects for every query
block from its own queries. Queries and keys are pooled over short runs (`pool` tokens, so that the
fast rotary dimensions survive), block masses follow from the pooled logits, and blocks are taken
in descending order until `mass` of the estimated mass is covered. Blocks that are left out enter
as one mean key and mean value each (1/64 of the dense cost). Sink, local band and the prompt's last
rows are always dense; so is everything below `dense_below` tokens.
"""

from __future__ import annotations

import math

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
from gpu_worker.patterns.block_sparse import pool_blocks


@PATTERNS.register("adaptive")
class Adaptive(Pattern):
    """Mass threshold over pooled block scores; see the module's text for the parameters."""

    name = "adaptive"

    def __init__(
        self,
        mass: float = 0.95,
        pool: int = 16,
        query_block: int = 128,
        sink_tokens: int = 64,
        band_tokens: int = 256,
        dense_last_rows: int = 128,
        dense_below: int = 8192,
        max_blocks: int = 0,
        mean_correction: bool = True,
    ) -> None:
        self.mass = mass
        self.pool = pool
        self.query_block = query_block
        self.sink_tokens = sink_tokens
        self.band_tokens = band_tokens
        self.dense_last_rows = dense_last_rows
        self.dense_below = dense_below
        self.max_blocks = max_blocks
        self.mean_correction = mean_correction

    def block_masses(self, q: Tensor, k: Tensor, start: int, scale: float) -> Tensor:
        """Estimated share of each key block in the attention of each query block.

        fp32 [q_heads, query_blocks, key_blocks]; the highest share over the block's pooled rows,
        so that a few rows that look elsewhere are not outvoted.
        """
        rows = q.shape[1]
        query_blocks, key_blocks, causal = block_grid(rows, start, self.query_block)
        pooled_q = pool_blocks(q, self.pool)
        pooled_k = pool_blocks(k, self.pool).repeat_interleave(q.shape[0] // k.shape[0], 0)
        logits = pooled_q @ pooled_k.transpose(1, 2) * scale
        per_block = KEY_BLOCK // self.pool
        pad = key_blocks * per_block - logits.shape[2]
        logits = torch.nn.functional.pad(logits, (0, pad), value=-torch.inf)
        block_logits = logits.unflatten(2, (key_blocks, per_block)).logsumexp(-1)
        pooled_per_query_block = self.query_block // self.pool
        visible = causal.to(q.device).repeat_interleave(pooled_per_query_block, 0)
        visible = visible[: block_logits.shape[1]]
        shares = block_logits.masked_fill(~visible, -torch.inf).softmax(-1)
        missing = query_blocks * pooled_per_query_block - shares.shape[1]
        shares = torch.nn.functional.pad(shares, (0, 0, 0, missing))
        return shares.unflatten(1, (query_blocks, pooled_per_query_block)).amax(2)

    def select(
        self, q: Tensor, k: Tensor, start: int, total: int, scale: float, state: object
    ) -> Selection | None:
        """Blocks in descending order of mass until the threshold is covered."""
        rows = q.shape[1]
        if start + rows <= self.dense_below:
            return None
        _, _, causal = block_grid(rows, start, self.query_block)
        masses = self.block_masses(q, k, start, scale)
        ordered, order = masses.sort(dim=-1, descending=True)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        before = ordered.cumsum(-1) - ordered
        taken = before < self.mass
        if self.max_blocks:
            taken[..., self.max_blocks :] = False
        blocks = torch.zeros_like(taken).scatter_(-1, order, taken)
        always = diagonal_blocks(rows, start, self.query_block, self.band_tokens)
        always[:, : math.ceil(self.sink_tokens / KEY_BLOCK)] = True
        always[self._first_dense_block(rows, start, total) :] = True
        blocks = (blocks | always.to(q.device)) & causal.to(q.device)
        return Selection(blocks, self.query_block, mean_correction=self.mean_correction)

    def _first_dense_block(self, rows: int, start: int, total: int) -> int:
        first_row = max(0, total - self.dense_last_rows - start)
        return first_row // self.query_block if first_row < rows else rows
