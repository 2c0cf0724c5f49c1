"""Prefill attention under a `Selection`, for CUDA: one program per (query tile, query head).

A program runs one online softmax over three lists of its tile: whole key blocks (causal inside the
diagonal), gathered key columns, and the means of the blocks left out with the logarithm of the
number of their keys added. Softmax is kept in base 2 inside and returned as natural log-sum-exp. K
and V are read by KV head, never repeated over a group. Head sizes need not be powers of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.patterns.base import KEY_BLOCK, PatternResult, Selection, left_out_keys
from gpu_worker.patterns.block_sparse import pool_blocks


@triton.jit
def _absorb(logits, values, highest, total, output):  # type: ignore[no-untyped-def]
    """One step of the online softmax, base 2: a tile of logits [m, n] and values [n, d]."""
    higher = tl.maximum(highest, tl.max(logits, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(logits - safe[:, None])
    decay = tl.exp2(highest - safe)
    total = total * decay + tl.sum(weights, 1)
    output = output * decay[:, None]
    output = tl.dot(weights.to(values.dtype), values, output, input_precision="ieee")
    return higher, total, output


@triton.jit
def _attend_tile(  # type: ignore[no-untyped-def]
    q, k, v, mean_k, mean_v, block_ids, block_counts, columns, column_counts, left_out, out, lse,
    rows, start, scale, max_blocks, max_columns, means,
    q_head_stride, k_head_stride, v_head_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attends rows [tile * TILE, ...) of one query head. `scale` includes log2(e)."""
    tile, head = tl.program_id(0), tl.program_id(1)
    tiles = tl.num_programs(0)
    kv_head = head // GROUP
    row = tile * TILE + tl.arange(0, TILE)
    dim, value_dim = tl.arange(0, HEAD_PAD), tl.arange(0, VALUE_PAD)
    has_dim, has_value_dim = dim < HEAD_DIM, value_dim < VALUE_DIM
    lane = tl.arange(0, BLOCK)
    q_at = q + head * q_head_stride + row[:, None] * HEAD_DIM + dim[None]
    queries = tl.load(q_at, mask=(row < rows)[:, None] & has_dim[None], other=0.0)
    highest = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    output = tl.zeros([TILE, VALUE_PAD], tl.float32)
    k += kv_head * k_head_stride
    v += kv_head * v_head_stride

    entry = head * tiles + tile
    for i in range(tl.load(block_counts + entry)):
        key = tl.load(block_ids + entry * max_blocks + i) * BLOCK + lane
        present = key < start + rows
        keys = tl.load(
            k + key[None] * HEAD_DIM + dim[:, None],
            mask=present[None] & has_dim[:, None],
            other=0.0,
        )
        logits = tl.dot(queries, keys, input_precision="ieee") * scale
        logits = tl.where(key[None] <= (start + row)[:, None], logits, float("-inf"))
        values = tl.load(
            v + key[:, None] * VALUE_DIM + value_dim[None],
            mask=present[:, None] & has_value_dim[None],
            other=0.0,
        )
        highest, total, output = _absorb(logits, values, highest, total, output)

    count = tl.load(column_counts + entry)
    for i in range(0, count, BLOCK):
        present = i + lane < count
        key = tl.load(columns + entry * max_columns + i + lane, mask=present, other=0)
        keys = tl.load(
            k + key[None] * HEAD_DIM + dim[:, None],
            mask=present[None] & has_dim[:, None],
            other=0.0,
        )
        logits = tl.dot(queries, keys, input_precision="ieee") * scale
        logits = tl.where(present[None], logits, float("-inf"))
        values = tl.load(
            v + key[:, None] * VALUE_DIM + value_dim[None],
            mask=present[:, None] & has_value_dim[None],
            other=0.0,
        )
        highest, total, output = _absorb(logits, values, highest, total, output)

    for i in range(0, means, BLOCK):
        block = i + lane
        left = tl.load(left_out + entry * means + block, mask=block < means, other=0)
        keys = tl.load(
            mean_k + (kv_head * means + block)[None] * HEAD_DIM + dim[:, None],
            mask=(block < means)[None] & has_dim[:, None],
            other=0.0,
        )
        logits = tl.dot(queries, keys, input_precision="ieee") * scale
        logits += tl.log2(tl.maximum(left, 1).to(tl.float32))[None]
        logits = tl.where((left > 0)[None], logits, float("-inf"))
        values = tl.load(
            mean_v + (kv_head * means + block)[:, None] * VALUE_DIM + value_dim[None],
            mask=(block < means)[:, None] & has_value_dim[None],
            other=0.0,
        )
        highest, total, output = _absorb(logits, values, highest, total, output)

    out_at = out + (head * rows + row)[:, None] * VALUE_DIM + value_dim[None]
    tl.store(out_at, output / total[:, None], mask=(row < rows)[:, None] & has_value_dim[None])
    tl.store(lse + head * rows + row, (highest + tl.log2(total)) * 0.6931471805599453, row < rows)


@dataclass(frozen=True, slots=True)
class PackedSelection:
    """A selection as lists per (head, tile), on the device.

    block_ids int32 [q_heads, tiles, max_blocks] ascending, block_counts [q_heads, tiles];
    columns int32 [q_heads, tiles, max_columns] outside the tile's blocks and before its first row,
    column_counts; left_out int8 [q_heads, tiles, means]: keys of a block that
    enter as its mean, 0 for none.
    """

    block_ids: Tensor
    block_counts: Tensor
    columns: Tensor
    column_counts: Tensor
    left_out: Tensor


def pack_selection(selection: Selection, start: int, rows: int) -> PackedSelection:
    """Lists for the kernel, built on the selection's own device without a Python loop."""
    blocks = selection.blocks
    q_heads, tiles, key_blocks = blocks.shape
    device = blocks.device
    counts = blocks.sum(-1, dtype=torch.int32)
    ids = (~blocks).to(torch.int8).argsort(stable=True, dim=-1).to(torch.int32)
    ids = ids[..., : max(1, int(counts.max()))].contiguous()
    first_row = start + torch.arange(tiles, device=device) * selection.query_block
    columns = torch.zeros(q_heads, tiles, 1, dtype=torch.int32, device=device)
    column_counts = torch.zeros(q_heads, tiles, dtype=torch.int32, device=device)
    if selection.columns is not None:
        wanted = selection.columns
        inside = blocks.gather(-1, (wanted.clamp(min=0) // KEY_BLOCK).clamp(max=key_blocks - 1))
        keep = (wanted >= 0) & (wanted < first_row[:, None]) & ~inside
        order = (~keep).to(torch.int8).argsort(stable=True, dim=-1)
        column_counts = keep.sum(-1, dtype=torch.int32)
        longest = max(1, int(column_counts.max()))
        columns = wanted.gather(-1, order)[..., :longest].to(torch.int32).contiguous()
    means = (start + rows) // KEY_BLOCK if selection.mean_correction else 0
    left_out = left_out_keys(selection, start, means).to(torch.int8).contiguous()
    return PackedSelection(ids, counts, columns, column_counts, left_out)


def pairs_of(packed: PackedSelection, tile: int, start: int, rows: int) -> int:
    """(row, key) pairs the kernel attends exactly: its true work, for the density."""
    device = packed.block_counts.device
    tiles = packed.block_counts.shape[1]
    first = torch.arange(tiles, device=device) * tile
    tile_rows = (rows - first).clamp(max=tile)
    # Blocks wholly before the tile count for every row; those on the diagonal form a triangle.
    lanes = torch.arange(packed.block_ids.shape[-1], device=device)
    listed = lanes < packed.block_counts[..., None]
    past = listed & (packed.block_ids * KEY_BLOCK < (start + first)[:, None])
    whole = (past.sum(-1) * KEY_BLOCK + packed.column_counts) * tile_rows
    triangle = tile_rows * (tile_rows + 1) // 2
    return int(whole.sum() + triangle.sum() * packed.block_counts.shape[0])


def attend_selection_triton(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, selection: Selection
) -> PatternResult:
    """`patterns.executor.attend_selection` on the device: q [q_heads, rows, d], k and v
    [kv_heads, start + rows, ·], any one of fp32, fp16 and bf16."""
    q_heads, rows, head_dim = q.shape
    value_dim = v.shape[-1]
    packed = pack_selection(selection, start, rows)
    q = q.contiguous()
    k, v = (x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else x.contiguous() for x in (k, v))
    means = packed.left_out.shape[-1]
    mean_k, mean_v = (
        pool_blocks(x[:, : means * KEY_BLOCK], KEY_BLOCK).to(x.dtype).contiguous()
        if means
        else x.new_zeros(1)
        for x in (k, v)
    )
    out = torch.empty(q_heads, rows, value_dim, device=q.device)
    lse = torch.empty(q_heads, rows, device=q.device)
    tiles = packed.block_counts.shape[1]
    _attend_tile[(tiles, q_heads)](
        q, k, v, mean_k, mean_v, packed.block_ids, packed.block_counts, packed.columns,
        packed.column_counts, packed.left_out, out, lse,
        rows, start, scale * math.log2(math.e), packed.block_ids.shape[-1],
        packed.columns.shape[-1], means, q.stride(0), k.stride(0), v.stride(0),
        GROUP=q_heads // k.shape[0], HEAD_DIM=head_dim,
        HEAD_PAD=max(16, triton.next_power_of_2(head_dim)), VALUE_DIM=value_dim,
        VALUE_PAD=max(16, triton.next_power_of_2(value_dim)),
        TILE=selection.query_block, BLOCK=KEY_BLOCK,
    )  # fmt: skip
    visible = q_heads * (rows * start + rows * (rows + 1) // 2)
    return PatternResult(out, lse, pairs_of(packed, selection.query_block, start, rows), visible)
