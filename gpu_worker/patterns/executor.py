"""Attends a selection fast: a Triton kernel on CUDA, torch's own flash attention on CPU.

On CPU three disjoint parts are merged by log-sum-exp: the diagonal tiles (causal, one batched
call), the selected past blocks and columns (gathered per head and query block, no mask), and the
means of the blocks left out (one call with the block sizes as bias). K and V are never repeated
over a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from gpu_worker.attention import (
    Partial,
    bias_of,
    blockwise_attention,
    causal_attention,
    dense_attention,
    merge,
)
from gpu_worker.head_threads import for_each_head
from gpu_worker.patterns.base import KEY_BLOCK, PatternResult, Selection, left_out_keys
from gpu_worker.patterns.block_sparse import pool_blocks

# Finite, because a row that leaves no block out must still not make NaN: its lse is then so low
# that merging gives it no weight.
_NEVER = -1e30
_LEAST_FILL = 0.8
_GATHER_BYTES = 32 << 20
# Torch's flash attention cuts the rows of a tile into about as many pieces of work.
_PIECES_OF_TILE = 4
_BLOCK_BITS = KEY_BLOCK.bit_length() - 1


def attend_selection(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, selection: Selection | None
) -> PatternResult:
    """Attention of a chunk under its selection; same meaning as `reference.attend_reference`.

    q [q_heads, rows, d], k and v [kv_heads, start + rows, ·]; `start` and the selection's query
    block are multiples of KEY_BLOCK, and the diagonal is always attended.
    """
    q_heads, rows, _ = q.shape
    if start % KEY_BLOCK:
        raise ValueError(f"a chunk starts at {start}; it must be a multiple of {KEY_BLOCK}")
    visible = q_heads * (rows * start + rows * (rows + 1) // 2)
    if selection is None:
        dense = causal_attention(q, k, v, start, scale)
        return PatternResult(dense.output, dense.lse, visible, visible)
    if selection.pairs is not None:
        return _attend_pairs(q, k, v, start, scale, selection.pairs)
    if q.is_cuda:
        # Imported here because Triton compiles for a device that CPU machines do not have.
        from gpu_worker.kernels.sparse_prefill import attend_selection_triton

        return attend_selection_triton(q, k, v, start, scale, selection)
    tile = selection.query_block
    part = _diagonal(q, k[:, start:], v[:, start:], tile, scale)
    past, pairs = _selected_past(q, k, v, start, scale, selection)
    part = merge(part, past)
    if selection.mean_correction and start + rows > tile:
        part = merge(part, _means(q, k, v, start, scale, selection))
    attended = q_heads * _triangle(rows, tile) + pairs
    return PatternResult(part.output, part.lse, attended, visible)


def _attend_pairs(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, pairs: Tensor
) -> PatternResult:
    """Single pairs, one head at a time: reference patterns, whose time nobody counts."""
    q_heads, rows, _ = q.shape
    group = q_heads // k.shape[0]
    parts = [
        blockwise_attention(
            q[None, None, head], k[None, None, head // group], v[None, None, head // group],
            scale, bias=bias_of(pairs[head]),
        )
        for head in range(q_heads)
    ]  # fmt: skip
    visible = q_heads * (rows * start + rows * (rows + 1) // 2)
    return PatternResult(
        torch.cat([part.output[0] for part in parts]),
        torch.cat([part.lse[0] for part in parts]),
        int(pairs.sum()),
        visible,
    )


def _triangle(rows: int, tile: int) -> int:
    """Causal pairs inside the diagonal tiles."""
    whole, rest = divmod(rows, tile)
    return whole * (tile * (tile + 1) // 2) + rest * (rest + 1) // 2


def _diagonal(q: Tensor, k: Tensor, v: Tensor, tile: int, scale: float) -> Partial:
    """Causal attention inside tiles of `tile` rows; all whole tiles in one call, as if each tile
    of a KV head were a head of its own."""
    q_heads, rows, _ = q.shape
    kv_heads = k.shape[0]
    whole = rows // tile * tile
    parts = []
    if whole:
        tiles = whole // tile
        grouped = q[:, :whole].reshape(kv_heads, q_heads // kv_heads, tiles, tile, -1)
        folded = grouped.transpose(1, 2).reshape(q_heads * tiles, tile, -1)
        keys, values = (x[:, :whole].reshape(kv_heads * tiles, tile, -1) for x in (k, v))
        part = causal_attention(folded, keys, values, 0, scale)
        shape = (kv_heads, tiles, q_heads // kv_heads, tile)
        output = part.output.reshape(*shape, -1).transpose(1, 2).reshape(q_heads, whole, -1)
        lse = part.lse.reshape(shape).transpose(1, 2).reshape(q_heads, whole)
        parts.append(Partial(output, lse))
    if whole < rows:
        parts.append(causal_attention(q[:, whole:], k[:, whole:], v[:, whole:], 0, scale))
    return Partial(torch.cat([p.output for p in parts], 1), torch.cat([p.lse for p in parts], 1))


@dataclass(frozen=True, slots=True)
class _Tile:
    """One query block of one head: its rows in the chunk and the past keys it gathers.

    `keys`: numbers of whole key blocks, or single positions.
    """

    head: int
    low: int
    high: int
    keys: Tensor


def _selected_past(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, selection: Selection
) -> tuple[Partial, int]:
    """Selected blocks and columns before each query block's tile; also the pairs attended.

    Where one tile has not enough work for all threads, tiles with about as many keys share one
    flash call; it then needs a mask over their padding, which costs up to a fifth of the time.
    """
    q_heads, rows, _ = q.shape
    output = q.new_zeros(q_heads, rows, v.shape[-1], dtype=torch.float32)
    lse = torch.full((q_heads, rows), -math.inf, device=q.device)
    unit = KEY_BLOCK if selection.columns is None else 1
    tiles = _tiles(q, start, selection)
    group = q_heads // k.shape[0]
    bytes_per_key = unit * (k.shape[-1] + v.shape[-1]) * k.element_size()
    most = math.ceil(torch.get_num_threads() / _PIECES_OF_TILE)

    def attend_head(kv_head: int) -> None:
        own = [tile for tile in tiles if tile.head // group == kv_head]
        units = [_units(x[kv_head], unit) for x in (k, v)]
        for batch in _batches(own, most, bytes_per_key):
            part = _attend_batch(q, batch, units, scale)
            for i, tile in enumerate(batch):
                output[tile.head, tile.low : tile.high] = part.output[i, 0]
                lse[tile.head, tile.low : tile.high] = part.lse[i, 0]

    for_each_head(attend_head, k.shape[0], k.device)
    pairs = sum(tile.keys.numel() * unit * (tile.high - tile.low) for tile in tiles)
    return Partial(output, lse), pairs


def _attend_batch(q: Tensor, batch: list[_Tile], units: list[Tensor], scale: float) -> Partial:
    """Tiles of equal rows over the keys each gathers from `units`, [units, positions, ·] of K and
    V of their KV head: output [tiles, 1, rows, value_dim]."""
    longest = max(tile.keys.numel() for tile in batch)
    where = pad_sequence([tile.keys for tile in batch], batch_first=True)
    keys, values = (
        x.index_select(0, where.flatten()).view(len(batch), 1, -1, x.shape[2]) for x in units
    )
    counts = torch.tensor([tile.keys.numel() for tile in batch])
    bias = None
    if int(counts.min()) < longest:
        present = torch.arange(longest) < counts[:, None]
        bias = bias_of(present).repeat_interleave(units[0].shape[1], 1)[:, None, None]
    queries = torch.stack([q[tile.head, tile.low : tile.high] for tile in batch])
    return dense_attention(queries[:, None], keys, values, scale, bias=bias)


def _units(x: Tensor, unit: int) -> Tensor:
    """[n, d] in units of `unit` positions, a view: [n // unit, unit, d]."""
    whole = x.shape[0] // unit
    return x[: whole * unit].view(whole, unit, x.shape[1])


def _tiles(q: Tensor, start: int, selection: Selection) -> list[_Tile]:
    """Every tile that has past keys, those with most keys first."""
    q_heads, rows, _ = q.shape
    tile = selection.query_block
    past = (start + torch.arange(selection.blocks.shape[1]) * tile) // KEY_BLOCK
    blocks = selection.blocks.cpu()
    chosen = blocks & (torch.arange(blocks.shape[2]) < past[:, None])
    columns = None if selection.columns is None else selection.columns.cpu()
    if columns is not None:
        # Those in the past, and in no block that is attended anyway. The last block is no past.
        open_blocks = ~blocks & (torch.arange(blocks.shape[2]) < past[:, None])
        where = columns.clamp(0, blocks.shape[2] * KEY_BLOCK - 1) >> _BLOCK_BITS
        single = (columns >= 0) & open_blocks.gather(2, where)
    tiles = []
    for head in range(q_heads):
        for b in range(blocks.shape[1]):
            keys = chosen[head, b].nonzero()[:, 0]
            if columns is not None:
                inside = keys[:, None] * KEY_BLOCK + torch.arange(KEY_BLOCK)
                keys = torch.cat([inside.flatten(), columns[head, b][single[head, b]]])
            if keys.numel():
                tiles.append(_Tile(head, b * tile, min(rows, (b + 1) * tile), keys))
    return sorted(tiles, key=lambda tile: (tile.high - tile.low, tile.keys.numel()), reverse=True)


def _batches(tiles: list[_Tile], most: int, bytes_per_key: int) -> Iterator[list[_Tile]]:
    """Runs of at most `most` tiles of equal rows that waste little padding and fit the gather
    buffer."""
    batch: list[_Tile] = []
    for tile in tiles:
        full = batch and (
            len(batch) == most
            or tile.high - tile.low != batch[0].high - batch[0].low
            or tile.keys.numel() < _LEAST_FILL * batch[0].keys.numel()
            or (len(batch) + 1) * batch[0].keys.numel() * bytes_per_key > _GATHER_BYTES
        )
        if full:
            yield batch
            batch = []
        batch.append(tile)
    if batch:
        yield batch


def _means(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, selection: Selection
) -> Partial:
    """The blocks left out, each as its mean key and value with the number of its keys that are
    not attended as columns in the logit."""
    q_heads, rows, _ = q.shape
    kv_heads = k.shape[0]
    whole = (start + rows) // KEY_BLOCK
    mean_k, mean_v = (pool_blocks(x[:, : whole * KEY_BLOCK], KEY_BLOCK) for x in (k, v))
    keys = left_out_keys(selection, start, whole)
    # A query block of a head is to the kernel a head of its own, so that one row of bias serves it.
    tile, tiles = selection.query_block, keys.shape[1]
    queries = functional.pad(q.float(), (0, 0, 0, tiles * tile - rows))
    queries = queries.reshape(kv_heads, -1, tile, q.shape[-1])
    bias = torch.where(keys > 0, keys.log(), _NEVER).view(kv_heads, -1, 1, whole)
    bias = bias.expand(-1, -1, tile, -1)
    shared_k, shared_v = (x[:, None].expand(-1, queries.shape[1], -1, -1) for x in (mean_k, mean_v))
    part = dense_attention(queries, shared_k, shared_v, scale, bias=bias)
    output = part.output.reshape(q_heads, tiles * tile, -1)[:, :rows]
    return Partial(output, part.lse.reshape(q_heads, -1)[:, :rows])
