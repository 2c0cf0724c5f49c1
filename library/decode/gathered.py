"""Attention over keys that were chosen per head, and the bookkeeping of what was chosen."""

from __future__ import annotations

import torch

from gpu_worker.attention import LayerCall, Partial, bias_of, dense_attention
from longreach.types import Span, WorkFigures

_GATHER_BYTES = 64 << 20


def attend_rows(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
) -> Partial:
    """Attention of queries [q_heads, T, d] over all of keys [heads, n, d], n > 0.

    `heads` divides q_heads: the query heads of a group share a row of keys.
    """
    q_heads, tokens, dim = queries.shape
    heads = keys.shape[0]
    folded = queries.reshape(1, heads, q_heads // heads * tokens, dim)
    part = dense_attention(folded, keys[None], values[None], call.scale, call.softcap)
    return Partial(part.output.reshape(q_heads, tokens, -1), part.lse.reshape(q_heads, tokens))


def take(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows [kv_heads, n, d] at ids [q_heads, ...]: each query head from its own KV head."""
    kv_heads, stored, dim = rows.shape
    group = ids.shape[0] // kv_heads
    offsets = torch.arange(ids.shape[0], device=ids.device) // group * stored
    flat = ids + offsets.view(-1, *[1] * (ids.ndim - 1))
    return rows.reshape(kv_heads * stored, dim)[flat]


def distinct(chosen: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Bool [q_heads, ...] as bool [kv_heads, ...]: chosen by any query head of the group."""
    return chosen.unflatten(0, (kv_heads, -1)).any(1)


def attend_blocks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: torch.Tensor,
    size: int,
    scope: Span,
    call: LayerCall,
) -> Partial:
    """Attention of queries [q_heads, T, d] over the blocks [q_heads, T, b] that each row chose.

    Block i holds positions [i * size, (i + 1) * size) of keys [kv_heads, n, d]; positions outside
    the scope are left out. Every row's blocks hold at least one position in scope.
    """
    q_heads, tokens, count = blocks.shape
    row_bytes = q_heads * count * size * (keys.shape[2] + values.shape[2]) * keys.element_size()
    step = max(1, _GATHER_BYTES // max(1, row_bytes))
    outputs, lses = [], []
    within = torch.arange(size, device=blocks.device)
    for start in range(0, tokens, step):
        part = slice(start, start + step)
        ids = (blocks[:, part, :, None] * size + within).flatten(2)
        keep = (ids >= scope.start) & (ids < scope.stop)
        ids = ids.clamp(max=keys.shape[1] - 1)
        shape = ids.shape[:2]
        found = dense_attention(
            queries[:, part].reshape(-1, 1, 1, queries.shape[2]),
            take(keys, ids).flatten(0, 1)[:, None],
            take(values, ids).flatten(0, 1)[:, None],
            call.scale,
            call.softcap,
            bias_of(keep).flatten(0, 1)[:, None, None],
        )
        outputs.append(found.output.reshape(*shape, -1))
        lses.append(found.lse.reshape(shape))
    return Partial(torch.cat(outputs, 1), torch.cat(lses, 1))


def overlaps(count: int, size: int, scope: Span, device: torch.device) -> torch.Tensor:
    """How many positions of the scope each of `count` blocks of `size` positions holds."""
    starts = torch.arange(count, device=device) * size
    return ((starts + size).clamp(max=scope.stop) - starts.clamp(min=scope.start)).clamp(min=0)


def read_in_full(pairs: int, row_bytes: int) -> WorkFigures:
    """Work of attending `pairs` (KV head, position) pairs whose keys and values were read."""
    return WorkFigures(keys_scanned=pairs, keys_attended=pairs, bytes_read=pairs * row_bytes)
