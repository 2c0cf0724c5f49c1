"""Our own selection: per query block, every key whose estimated share of the attention is worth it.

Where the published vertical-slash selects once from 64 probe queries, this selects for every query
block from its own queries, and single keys instead of whole blocks:

1. Sink, local band and the query block itself are always attended. Their part of each row's
   softmax denominator is computed exactly, so that a head that looks nearby selects nothing else.
2. The keys before them are scored in two views. Runs of `tall_pool` queries against every key find
   keys that many rows like. Runs of `row_pool` queries, first against whole blocks of keys, then,
   in the blocks that are most promising by both, against runs of `key_pool` keys, find text that a
   few rows look for: its cost hardly grows with the prompt. Pooling is of rotated queries and keys;
   the first view pools no keys and the second few of either, so that the fast rotary dimensions
   survive. Both give shares of the block's attention; their mean is the estimate.
3. A key is attended where its share is at least `min_share`, and among the `max_keys` highest of
   the query block. One threshold on absolute shares, not a mass to be covered in every block: keys
   go to the heads and rows that gain most from them. Pooled logits underestimate how much lies far
   away, which is why the threshold is far below 1 / max_keys.
4. Of each block of keys, those left out enter together as the block's mean key and mean value,
   with the logarithm of their number added to the logit (1/64 of the dense cost).

The prompt's last rows are dense, its first `dense_first_rows` too, where dense attention costs less
than selecting, and so is a prompt up to `dense_below` tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from gpu_worker.head_threads import for_each_head
from gpu_worker.linear import cpu_multiplies_16_bits
from gpu_worker.patterns.base import (
    KEY_BLOCK,
    PATTERNS,
    Pattern,
    Selection,
    block_grid,
    diagonal_blocks,
)
from gpu_worker.patterns.block_sparse import pool_blocks

_SLICE_KEYS = 8192
_FINE_PART = 8
"""One block in so many is scored run by run, besides the first `fine_blocks`."""


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
        key_pool: int = 4,
        fine_blocks: int = 96,
        fine_share: float = 5e-5,
        least_blocks: int = 32,
        query_block: int = 128,
        sink_tokens: int = 64,
        band_tokens: int = 64,
        dense_first_rows: int = 4096,
        dense_last_rows: int = 128,
        dense_below: int = 8192,
        mean_correction: bool = True,
    ) -> None:
        self.min_share = min_share
        self.max_keys = max_keys
        self.tall_pool = tall_pool
        self.row_pool = row_pool
        self.key_pool = key_pool
        self.fine_blocks = fine_blocks
        self.fine_share = fine_share
        self.least_blocks = least_blocks
        self.query_block = query_block
        self.sink_tokens = sink_tokens
        self.band_tokens = band_tokens
        self.dense_first_rows = dense_first_rows
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
        always[: self._sparse_from(start)] = True
        always = (always & causal).to(q.device)
        groups = q.unflatten(0, (k.shape[0], -1))
        by_head = for_each_head(
            lambda head: self._columns(groups[head], k[head], start, dense_from, scale),
            k.shape[0],
            k.device,
        )
        columns = [each for of_group in by_head for each in of_group]
        padded = pad_sequence(columns, batch_first=True, padding_value=-1)
        return Selection(
            always.expand(q_heads, -1, -1).clone(),
            self.query_block,
            padded.view(q_heads, always.shape[0], -1),
            self.mean_correction,
        )

    @property
    def _sink_blocks(self) -> int:
        return math.ceil(self.sink_tokens / KEY_BLOCK)

    def _sparse_from(self, start: int) -> int:
        """Number of the first query block that is not among the prompt's first, dense rows."""
        return max(0, math.ceil((self.dense_first_rows - start) / self.query_block))

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
        size, low = self.query_block, self._sink_blocks
        band = math.ceil(self.band_tokens / KEY_BLOCK)
        grid = range(-(-rows // size))
        # The key blocks up to which each query block chooses; blocks with none choose nothing.
        highs = [(start + b * size) // KEY_BLOCK - band for b in grid]
        few = [b for b in grid if self._sparse_from(start) <= b < dense_from and highs[b] > low]
        none = torch.zeros(0, dtype=torch.int64, device=q.device)
        chosen = [[none for _ in grid] for _ in range(group)]
        if few:
            scored = slice(few[0] * size, min(rows, (few[-1] + 1) * size))
            keys = k[: start + scored.stop]
            near = nearby_lse(
                q[:, scored], keys, start + scored.start, size, low * KEY_BLOCK,
                band * KEY_BLOCK, scale,
            )  # fmt: skip
            far = _Keys.of(k[low * KEY_BLOCK : highs[few[-1]] * KEY_BLOCK], self.key_pool)
            ends = [highs[b] - low for b in few]
            queries = q[:, scored] * scale
            tall_q = torch.stack([self._pooled(each, self.tall_pool) for each in queries])
            tall = products(tall_q.flatten(0, 1), far.each).unflatten(0, (group, -1))
            for head in range(group):
                shares = self._shares(queries[head], tall[head], far, near[head], ends)
                for b, share in zip(few, shares, strict=True):
                    found = best(share, 2 * self.min_share, self.max_keys)
                    chosen[head][b] = found + low * KEY_BLOCK
        return [columns for head in chosen for columns in head]

    def _shares(
        self, q: Tensor, tall: Tensor, keys: _Keys, nearby: Tensor, ends: list[int]
    ) -> Tensor:
        """Estimated shares of the keys, summed over both views: [query blocks, keys].

        q [rows, d], scaled; tall [runs of rows, keys]: logits of the first view, overwritten;
        nearby [query blocks, query_block]; `ends`: the number of blocks of keys that each query
        block may choose from, ascending.
        """
        row_q = self._in_blocks(self._pooled(q, self.row_pool).to(keys.runs.dtype), self.row_pool)
        coarse_logits = (row_q @ keys.blocks.T).float()
        tall_logits = self._in_blocks(tall, self.tall_pool)
        for b, end in enumerate(ends):
            tall_logits[b, :, end * KEY_BLOCK :] = -torch.inf
            coarse_logits[b, :, end:] = -torch.inf
        columns = _View.of(tall_logits, 1, nearby)
        shares = columns.shares(columns.denominators(columns.lse())).unflatten(1, (-1, KEY_BLOCK))
        coarse = _View.of(coarse_logits, KEY_BLOCK, nearby)
        worth = coarse.shares(coarse.denominators(coarse.lse())).add_(shares.sum(-1))
        for b, end in enumerate(ends):
            worth[b, end:] = -1.0
        # Whole blocks are scored first, then the runs of the most promising.
        promising = int((worth >= self.fine_share).sum(-1).max())
        most = self.fine_blocks + len(keys.blocks) // _FINE_PART
        count = min(len(keys.blocks), most, max(promising, self.least_blocks))
        where = worth.topk(count, sorted=False).indices
        logits = products_of_some(row_q, keys.runs, where)
        rows = where[:, None].expand(-1, row_q.shape[1], -1)
        if count > ends[0]:
            # What a query block may not choose stays impossible, run by run.
            closed = (
                where[:, None, :, None] >= torch.tensor(ends, device=q.device)[:, None, None, None]
            )
            logits.unflatten(2, (count, -1)).masked_fill_(closed, -torch.inf)
        fine = _View.of(logits, self.key_pool, nearby)
        coarse.weights.scatter_(2, rows, 0.0)
        below = coarse.denominators(torch.logaddexp(coarse.lse(), fine.lse()))
        shares += coarse.shares(below)[..., None] / KEY_BLOCK
        in_keys = (fine.shares(below) / self.key_pool).repeat_interleave(self.key_pool, 1)
        index = where[..., None].expand(-1, -1, KEY_BLOCK)
        shares.scatter_add_(1, index, in_keys.unflatten(1, (count, KEY_BLOCK)))
        return shares.flatten(1)

    def _pooled(self, q: Tensor, pool: int) -> Tensor:
        """Means of runs of q [rows, d], as if its last query block were whole: what is missing
        counts as nothing, and its means are of the rows that exist."""
        whole = -(-q.shape[0] // self.query_block) * self.query_block
        means = pool_blocks(q[None], pool)[0]
        return functional.pad(means, (0, 0, 0, whole // pool - len(means)))

    def _in_blocks(self, runs: Tensor, pool: int) -> Tensor:
        """Runs of `pool` queries [runs, ...] by query block."""
        return runs.unflatten(0, (-1, self.query_block // pool))


@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys that may be chosen: each [n, d], and as means of runs and of blocks, in the dtype
    of scoring: runs [n / KEY_BLOCK, runs in a block, d], blocks [n / KEY_BLOCK, d]."""

    each: Tensor
    runs: Tensor
    blocks: Tensor

    @classmethod
    def of(cls, k: Tensor, key_pool: int) -> _Keys:
        """From k [n, d], n a multiple of KEY_BLOCK."""
        runs = pool_blocks(k[None], key_pool)
        blocks = pool_blocks(runs, KEY_BLOCK // key_pool)[0]
        working = working_dtype(k)
        runs = runs[0].unflatten(0, (-1, KEY_BLOCK // key_pool))
        return cls(k, runs.to(working), blocks.to(working))


@dataclass(frozen=True, slots=True)
class _View:
    """Runs of queries against runs of keys, for some query blocks: `weights` [query blocks, runs of
    queries, runs of keys] times exp(highest) [query blocks, runs of queries, 1] are what the keys
    of a run add to the softmax denominators of the rows, as far as the runs' means tell.

    nearby [query blocks, runs of queries, rows in a run]: log-sum-exp of the keys that are not
    scored, infinite for rows that do not exist.
    """

    weights: Tensor
    highest: Tensor
    nearby: Tensor

    @classmethod
    def of(cls, logits: Tensor, keys_in_run: int, nearby: Tensor) -> _View:
        """From logits of the runs' means, overwritten; nearby [query blocks, rows]."""
        top = logits.amax(-1, keepdim=True)
        weights = logits.sub_(top).exp_()
        near = nearby.unflatten(1, (logits.shape[1], -1))
        return cls(weights, top + math.log(keys_in_run), near)

    def lse(self) -> Tensor:
        """Log-sum-exp of all keys of the view, [query blocks, runs of queries, 1]."""
        return self.highest + self.weights.sum(-1, keepdim=True).log()

    def denominators(self, scored: Tensor) -> Tensor:
        """Each row's: what is nearby, exactly, and the estimate `scored` that the rows of a run
        share."""
        return torch.logaddexp(self.nearby, scored)

    def shares(self, denominators: Tensor) -> Tensor:
        """Mean share of each run of keys in the attention of the rows, [query blocks, runs of
        keys]."""
        rows = self.nearby.isfinite().sum((1, 2))
        per_run = (self.highest - denominators).exp().sum(-1) / rows[:, None]
        return torch.bmm(per_run[:, None], self.weights)[:, 0]


def best(shares: Tensor, least: float, most: int) -> Tensor:
    """Numbers, ascending, of the shares [n] that reach `least`; the `most` highest of them. n is a
    multiple of KEY_BLOCK."""
    # Most blocks hold none, and one pass for the highest of each is the cheapest of all passes.
    blocks = shares.view(-1, KEY_BLOCK)
    some = (blocks.amax(1) >= least).nonzero()[:, 0]
    inside = blocks[some]
    at, offset = (inside >= least).nonzero(as_tuple=True)
    found = some[at] * KEY_BLOCK + offset
    if len(found) <= most:
        return found
    return found[shares[found].topk(most, sorted=False).indices.sort().values]


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is scored: fp32 on a CPU without AVX-512, elsewhere x's own.

    Such a CPU has no instruction for products of 16-bit floats: torch converts in every product,
    and the selection then takes several times as long as in fp32.
    """
    if x.device.type == "cpu" and not cpu_multiplies_16_bits():
        return torch.float32
    return x.dtype


def products(q: Tensor, k: Tensor) -> Tensor:
    """q·k in fp32 [r, n], for queries q [r, d] in fp32 and keys k [n, d] in their own dtype."""
    working = working_dtype(k)
    if k.dtype == working or k.is_cuda:
        return (q.to(k.dtype) @ k.T).float()
    # A slice that has been converted stays in a core's cache for its product.
    out = q.new_empty(q.shape[0], k.shape[0])
    for low in range(0, k.shape[0], _SLICE_KEYS):
        part = slice(low, low + _SLICE_KEYS)
        torch.mm(q, k[part].to(working).T, out=out[:, part])
    return out


def products_of_some(q: Tensor, runs: Tensor, where: Tensor) -> Tensor:
    """q·k in fp32 [query blocks, r, c * runs in a block] with the runs of the blocks of keys that
    each query block names: q [query blocks, r, d], runs [blocks, runs in a block, d], where [query
    blocks, c]."""
    if q.is_cuda:
        return torch.bmm(q, runs[where].flatten(1, 2).transpose(1, 2)).float()
    # One by one: the keys of all query blocks together would not stay in a cache.
    out = torch.empty(*q.shape[:2], where.shape[1] * runs.shape[1])
    for each, rows, named in zip(out, q, where, strict=True):
        each.copy_(rows @ runs.index_select(0, named).flatten(0, 1).T)
    return out


def nearby_lse(
    q: Tensor, k: Tensor, start: int, size: int, sink: int, band: int, scale: float
) -> Tensor:
    """Log-sum-exp over the first `sink` keys, the `band` keys before each query block and the
    block's own causal ones: fp32 [group, query blocks, size], infinite for rows that do not exist.

    q [group, rows, d] at positions from `start`, k [start + rows, d]. Means nothing for a block
    with less than `sink` + `band` keys before it.
    """
    group, rows, d = q.shape
    working = working_dtype(q)
    blocks = -(-rows // size)
    queries = functional.pad(q, (0, 0, 0, blocks * size - rows)).view(group, blocks, size, d)
    within = torch.arange(-band, size, device=q.device)
    at = start + torch.arange(blocks, device=q.device)[:, None] * size + within
    keys = k[at.clamp(0, k.shape[0] - 1)].to(working)
    queries = queries.to(working)
    own = (queries @ keys.transpose(1, 2)).float()
    own.masked_fill_(within > torch.arange(size, device=q.device)[:, None], -torch.inf)
    logits = torch.cat([(queries @ k[:sink].to(working).T).float(), own], -1)
    lse = (logits * scale).logsumexp(-1)
    lse.view(group, -1)[:, rows:] = torch.inf
    return lse
