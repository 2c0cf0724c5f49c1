"""Our own selection: per query block, every key whose estimated share of the attention is worth it.

Where the published vertical-slash selects once from 64 probe queries, this selects for every query
block from its own queries, and single keys instead of whole blocks:

1. Sink, local band and the query block itself are always attended. Their part of each row's
   softmax denominator is computed exactly, so that a head that looks nearby selects nothing else.
2. The keys before them are scored in two views of the same cost or less: runs of `tall_pool`
   queries against every key (finds keys that many rows like) and runs of `row_pool` queries against
   runs of `key_pool` keys (finds text that a few rows look for). Pooling is of rotated queries and
   keys; the first view pools no keys and the second few of either, so that the fast rotary
   dimensions survive. Both give shares of the block's attention; their mean is the estimate.
3. A key is attended where its share is at least `min_share`, and among the `max_keys` highest of
   the query block. One threshold on absolute shares, not a mass to be covered in every block: keys
   go to the heads and rows that gain most from them. Pooled logits underestimate how much lies far
   away, which is why the threshold is far below 1 / max_keys.
4. Of each block of keys, those left out enter together as the block's mean key and mean value,
   with the logarithm of their number added to the logit (1/64 of the dense cost).

The prompt's last rows are dense, and so is a prompt up to `dense_below` tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    """Threshold on the estimated share of each key; see the module's text for the parameters."""

    name = "adaptive"

    def __init__(
        self,
        min_share: float = 1e-6,
        max_keys: int = 4096,
        tall_pool: int = 64,
        row_pool: int = 4,
        key_pool: int = 8,
        query_block: int = 128,
        sink_tokens: int = 64,
        band_tokens: int = 64,
        dense_last_rows: int = 128,
        dense_below: int = 8192,
        mean_correction: bool = True,
    ) -> None:
        self.min_share = min_share
        self.max_keys = max_keys
        self.tall_pool = tall_pool
        self.row_pool = row_pool
        self.key_pool = key_pool
        self.query_block = query_block
        self.sink_tokens = sink_tokens
        self.band_tokens = band_tokens
        self.dense_last_rows = dense_last_rows
        self.dense_below = dense_below
        self.mean_correction = mean_correction

    def select(
        self, q: Tensor, k: Tensor, start: int, total: int, scale: float, state: object
    ) -> Selection | None:
        """Blocks that are always attended, and the columns whose share reaches the threshold."""
        if total <= self.dense_below:
            return None
        q_heads, rows, _ = q.shape
        _, _, causal = block_grid(rows, start, self.query_block)
        always = diagonal_blocks(rows, start, self.query_block, self.band_tokens)
        always[:, : self._sink_blocks] = True
        dense_from = self._first_dense_block(rows, start, total)
        always[dense_from:] = True
        always = (always & causal).to(q.device)
        by_head = [
            columns
            for queries, keys in zip(q.unflatten(0, (k.shape[0], -1)), k, strict=True)
            for columns in self._columns(queries, keys, start, dense_from, scale)
        ]
        padded = pad_sequence(by_head, batch_first=True, padding_value=-1)
        return Selection(
            always.expand(q_heads, -1, -1).clone(),
            self.query_block,
            padded.view(q_heads, always.shape[0], -1),
            self.mean_correction,
        )

    @property
    def _sink_blocks(self) -> int:
        return math.ceil(self.sink_tokens / KEY_BLOCK)

    def _first_dense_block(self, rows: int, start: int, total: int) -> int:
        first_row = max(0, total - self.dense_last_rows - start)
        return first_row // self.query_block if first_row < rows else rows

    def _columns(
        self, q: Tensor, k: Tensor, start: int, dense_from: int, scale: float
    ) -> list[Tensor]:
        """Columns of the queries q [group, rows, d] of one KV head with keys k [start + rows, d]:
        those of the first head's query blocks, then of the second's, and so on.

        Query blocks from number `dense_from` choose none.
        """
        group, rows, _ = q.shape
        working = working_dtype(q)
        q, k = q.to(working), k.to(working)
        low = self._sink_blocks * KEY_BLOCK
        tall_q = pool_blocks(q, self.tall_pool).to(q.dtype)
        tall_logits = (tall_q.flatten(0, 1) @ k.T).unflatten(0, (group, -1))
        row_q = pool_blocks(q, self.row_pool).to(q.dtype)
        key_runs = k.shape[0] // self.key_pool
        pooled_k = k[: key_runs * self.key_pool].view(key_runs, self.key_pool, k.shape[1])
        pooled_k = pooled_k.mean(1)
        chosen: list[list[Tensor]] = []
        for begin in range(0, rows, self.query_block):
            end = min(rows, begin + self.query_block)
            high = (start + begin - self.band_tokens) // KEY_BLOCK * KEY_BLOCK
            if begin >= dense_from * self.query_block or high <= low:
                chosen.append([torch.zeros(0, dtype=torch.int64, device=q.device)] * group)
                continue
            nearby = nearby_lse(q[:, begin:end], k[: start + end], low, high, scale)
            tall = tall_logits[:, _runs(begin, end, self.tall_pool), low:high]
            shares = shares_of(tall, nearby, self.tall_pool, 1, scale)
            few = row_q[:, _runs(begin, end, self.row_pool)]
            pairs = few @ pooled_k[low // self.key_pool : high // self.key_pool].T
            each = shares_of(pairs, nearby, self.row_pool, self.key_pool, scale)
            shares = shares.unflatten(1, (-1, self.key_pool)).add_(each[..., None]).flatten(1)
            chosen.append([low + self._best(head / 2) for head in shares])
        return [block[head] for head in range(group) for block in chosen]

    def _best(self, shares: Tensor) -> Tensor:
        """Numbers, ascending, of the keys whose share [n] is worth attending."""
        found = (shares >= self.min_share).nonzero()[:, 0]
        if len(found) <= self.max_keys:
            return found
        return shares.topk(self.max_keys).indices.sort().values


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is scored: fp32 on a CPU without AVX-512, elsewhere x's own.

    Such a CPU has no instruction for products of 16-bit floats: torch converts in every product,
    and the selection then takes several times as long as in fp32.
    """
    if x.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return torch.float32
    return x.dtype


def _runs(begin: int, end: int, pool: int) -> slice:
    """The runs of `pool` rows that rows [begin, end) make; `begin` is a multiple of `pool`."""
    return slice(begin // pool, -(-end // pool))


def nearby_lse(q: Tensor, k: Tensor, low: int, high: int, scale: float) -> Tensor:
    """Log-sum-exp over the keys before `low` and the causal ones from `high`, fp32 [group, rows].

    q [group, rows, d] are the queries of the last positions of k [n, d].
    """
    rows = q.shape[1]
    logits = (q @ torch.cat([k[:low], k[high:]]).T).float() * scale
    later = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)
    logits[..., -rows:].masked_fill_(later, -torch.inf)
    return logits.logsumexp(-1)


def shares_of(
    products: Tensor, nearby: Tensor, query_pool: int, key_pool: int, scale: float
) -> Tensor:
    """Mean share of a key in the attention of a query block's rows, for each run of keys.

    products [group, runs of `query_pool` queries, runs of `key_pool` keys]: q·k of the runs' means.
    nearby [group, rows]: log-sum-exp of the keys that are not scored. Returns fp32 [group, runs of
    keys].
    """
    group, runs, _ = products.shape
    rows = nearby.shape[1]
    logits = products.float() * scale
    highest = logits.amax(-1)
    weights = logits.sub_(highest[..., None]).exp_()
    scored = highest + (weights.sum(-1) * key_pool).log()
    # Each row divides by a denominator of its own: what is nearby, exactly, and the estimate of
    # the rest, which the rows of a run share.
    run = torch.arange(rows, device=nearby.device) // query_pool
    share = (highest[:, run] - torch.logaddexp(nearby, scored[:, run])).exp() / rows
    per_run = share.new_zeros(group, runs).index_add_(1, run, share)
    return torch.bmm(per_run[:, None], weights)[:, 0]
