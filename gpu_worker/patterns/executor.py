"""Attends a selection fast: a Triton kernel on CUDA, torch's own flash attention on CPU.

On CPU the parts are merged by log-sum-exp. Three disjoint parts make up a chunk: the diagonal tiles (causal, one batched call), the selected
past blocks and columns (gathered per head and query block, no mask), and the means of the blocks
left out (one call with the block sizes as bias). K and V are never repeated over a group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpu_worker.attention import Partial, causal_attention, dense_attention, merge
from gpu_worker.patterns.base import KEY_BLOCK, PatternResult, Selection
from gpu_worker.patterns.block_sparse import pool_blocks

# Finite, because a row that leaves no block out must still not make NaN: its lse is then so low
# that merging gives it no weight.
_NEVER = -1e30


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


def _selected_past(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, selection: Selection
) -> tuple[Partial, int]:
    """Selected blocks and columns before each query block's tile; also the pairs attended."""
    q_heads, rows, _ = q.shape
    group = q_heads // k.shape[0]
    output = q.new_zeros(q_heads, rows, v.shape[-1], dtype=torch.float32)
    lse = torch.full((q_heads, rows), -math.inf, device=q.device)
    blocks = selection.blocks.cpu()
    pairs = 0
    for b in range(blocks.shape[1]):
        low = b * selection.query_block
        high = min(rows, low + selection.query_block)
        past_blocks = (start + low) // KEY_BLOCK
        for head in range(q_heads):
            chosen = blocks[head, b, :past_blocks]
            keys = _gather(k[head // group], v[head // group], chosen, selection, head, b)
            if keys is None:
                continue
            part = dense_attention(
                q[None, head : head + 1, low:high], keys[0][None], keys[1][None], scale
            )
            output[head, low:high], lse[head, low:high] = part.output[0, 0], part.lse[0, 0]
            pairs += keys[0].shape[1] * (high - low)
    return Partial(output, lse), pairs


def _gather(
    k: Tensor, v: Tensor, chosen: Tensor, selection: Selection, head: int, query_block: int
) -> tuple[Tensor, Tensor] | None:
    """Keys and values [1, n, ·] of the chosen past blocks and of columns outside them."""
    past = chosen.numel() * KEY_BLOCK
    ids = chosen.nonzero()[:, 0]
    parts = []
    if ids.numel():
        if int(ids[-1]) - int(ids[0]) + 1 == ids.numel():
            run = slice(int(ids[0]) * KEY_BLOCK, (int(ids[-1]) + 1) * KEY_BLOCK)
            parts.append((k[run], v[run]))
        else:
            where = ids.to(k.device)
            parts.append(
                tuple(
                    x[:past].unflatten(0, (-1, KEY_BLOCK)).index_select(0, where).flatten(0, 1)
                    for x in (k, v)
                )
            )
    if selection.columns is not None:
        columns = selection.columns[head, query_block].cpu()
        columns = columns[(columns >= 0) & (columns < past)]
        columns = columns[~chosen[columns // KEY_BLOCK]].to(k.device)
        if columns.numel():
            parts.append((k[columns], v[columns]))
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0][0][None], parts[0][1][None]
    return torch.cat([p[0] for p in parts])[None], torch.cat([p[1] for p in parts])[None]


def _means(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, selection: Selection
) -> Partial:
    """The blocks left out, each as its mean key and value with the block's size in the logit."""
    q_heads, rows, _ = q.shape
    kv_heads = k.shape[0]
    whole = (start + rows) // KEY_BLOCK
    mean_k = pool_blocks(k[:, : whole * KEY_BLOCK], KEY_BLOCK).to(q.dtype)
    mean_v = pool_blocks(v[:, : whole * KEY_BLOCK], KEY_BLOCK).to(v.dtype)
    blocks = selection.blocks[:, :, :whole]
    first_row = start + torch.arange(blocks.shape[1], device=q.device) * selection.query_block
    past = (torch.arange(whole, device=q.device) + 1) * KEY_BLOCK <= first_row[:, None]
    bias = torch.where(~blocks & past, math.log(KEY_BLOCK), _NEVER)
    bias = bias.repeat_interleave(selection.query_block, 1)[:, :rows]
    part = dense_attention(
        q.reshape(1, kv_heads, -1, q.shape[-1]),
        mean_k[None],
        mean_v[None],
        scale,
        bias=bias.reshape(1, kv_heads, -1, whole),
    )
    return Partial(part.output.reshape(q_heads, rows, -1), part.lse.reshape(q_heads, rows))
