"""What a selection means, literally: the mask of every (row, key) pair, and attention under it.

Slow and plain; executors and kernels are held to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_worker.patterns.base import KEY_BLOCK, PatternResult, Selection


def selection_mask(selection: Selection | None, q_heads: int, start: int, rows: int) -> Tensor:
    """Bool [q_heads, rows, start + rows]: pairs attended exactly."""
    positions = torch.arange(start, start + rows)
    keys = torch.arange(start + rows)
    causal = keys[None] <= positions[:, None]
    if selection is None:
        return causal.expand(q_heads, -1, -1)
    if selection.pairs is not None:
        return selection.pairs.cpu() & causal
    row_block = torch.arange(rows) // selection.query_block
    mask = selection.blocks.cpu()[:, row_block][:, :, keys // KEY_BLOCK]
    if selection.columns is not None:
        columns = selection.columns.cpu()[:, row_block]
        extra = torch.zeros(q_heads, rows, start + rows + 1, dtype=torch.bool)
        columns = torch.where(
            (columns < 0) | (columns > positions[None, :, None]), start + rows, columns
        )
        mask = mask | extra.scatter_(2, columns, True)[..., :-1]
    return mask & causal


def mean_terms(
    selection: Selection, q: Tensor, k: Tensor, v: Tensor, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean keys, mean values [kv_heads, b, ·], int [q_heads, rows, b]: keys that enter as mean).

    A block that does not enter as its mean has 0 keys there.
    """
    rows = q.shape[1]
    whole = (start + rows) // KEY_BLOCK
    mean_k = k[:, : whole * KEY_BLOCK].float().unflatten(1, (whole, KEY_BLOCK)).mean(2)
    mean_v = v[:, : whole * KEY_BLOCK].float().unflatten(1, (whole, KEY_BLOCK)).mean(2)
    row_block = torch.arange(rows) // selection.query_block
    first_row = start + row_block * selection.query_block
    past = (torch.arange(whole) + 1) * KEY_BLOCK <= first_row[:, None]
    attended = selection_mask(selection, q.shape[0], start, rows)[:, :, : whole * KEY_BLOCK]
    left_out = (~attended).unflatten(2, (whole, KEY_BLOCK)).sum(-1)
    entering = ~selection.blocks.cpu()[:, row_block][:, :, :whole] & past
    return mean_k, mean_v, left_out * entering


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, selection: Selection | None
) -> PatternResult:
    """Attention of q [q_heads, rows, d] under the selection, fp32, by the full mask."""
    q_heads, rows, _ = q.shape
    group = q_heads // k.shape[0]
    mask = selection_mask(selection, q_heads, start, rows)
    wide_k, wide_v = (x.float().repeat_interleave(group, 0) for x in (k, v))
    logits = (q.float() @ wide_k.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf)
    if selection is not None and selection.mean_correction:
        mean_k, mean_v, left_out = mean_terms(selection, q, k, v, start)
        block_k = mean_k.repeat_interleave(group, 0)
        block_logits = q.float() @ block_k.transpose(1, 2) * scale + left_out.log()
        logits = torch.cat([logits, block_logits], -1)
        wide_v = torch.cat([wide_v, mean_v.repeat_interleave(group, 0)], 1)
    output = logits.softmax(-1) @ wide_v
    visible = q_heads * sum(range(start + 1, start + rows + 1))
    return PatternResult(output, logits.logsumexp(-1), int(mask.sum()), visible)
