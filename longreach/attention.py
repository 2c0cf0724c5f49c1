"""Partial attention and its merge: the NumPy specification.

Torch and native implementations are held to this module by one contract test. Softmax attention
over disjoint sets of keys forms an algebra: each part returns (output, lse) and `merge` gives what
attention over the union would have given, exactly. Logs are natural.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from longreach.types import FloatArray, PartialAttention, StorageArray

_LOWEST = np.finfo(np.float32).min


def empty_partial(shape: tuple[int, ...], value_dim: int) -> PartialAttention:
    """Attention over no keys: zeros and -inf, for queries of the given leading shape."""
    return PartialAttention(
        np.zeros((*shape, value_dim), np.float32), np.full(shape, -np.inf, np.float32)
    )


def attention_logits(
    queries: StorageArray, keys: StorageArray, scale: float, softcap: float = 0.0
) -> FloatArray:
    """Logits [..., rows, n] of queries [..., rows, d] against keys [..., n, d], fp32.

    `softcap` > 0 bounds them: z = softcap * tanh(z / softcap).
    """
    q = np.asarray(queries, np.float32) * np.float32(scale)
    logits = q @ np.swapaxes(np.asarray(keys, np.float32), -1, -2)
    if softcap > 0:
        logits = np.float32(softcap) * np.tanh(logits / np.float32(softcap))
    return np.asarray(logits, np.float32)


def softmax_partial(
    logits: FloatArray, values: StorageArray, keep: np.ndarray | None = None
) -> PartialAttention:
    """Partial attention from logits [..., rows, n] and values [..., n, value_dim].

    `keep` (bool, broadcastable to the logits) drops keys. Rows that keep none get lse -inf.
    """
    if keep is not None:
        logits = np.where(keep, logits, np.float32(-np.inf))
    if logits.shape[-1] == 0:
        return empty_partial(logits.shape[:-1], values.shape[-1])
    highest = logits.max(axis=-1, keepdims=True)
    safe = np.where(np.isfinite(highest), highest, np.float32(0))
    weights = np.exp(logits - safe)
    total = weights.sum(axis=-1, keepdims=True)
    output = weights @ np.asarray(values, np.float32) / np.where(total > 0, total, np.float32(1))
    with np.errstate(divide="ignore"):
        lse = np.log(total) + safe
    return PartialAttention(output.astype(np.float32), lse[..., 0].astype(np.float32))


def partial_attention(
    queries: StorageArray,
    keys: StorageArray,
    values: StorageArray,
    scale: float,
    softcap: float = 0.0,
    keep: np.ndarray | None = None,
) -> PartialAttention:
    """Exact attention of queries [rows, q_heads, d] over keys [kv_heads, n, d].

    Query head h uses KV head h // (q_heads // kv_heads). `keep` is a bool array broadcastable to
    [rows, q_heads, n]. Returns output [rows, q_heads, value_dim] and lse [rows, q_heads].
    """
    rows, q_heads, _ = queries.shape
    kv_heads, n, _ = keys.shape
    group = q_heads // kv_heads
    grouped = np.moveaxis(queries.reshape(rows, kv_heads, group, -1), 0, 2)
    if keep is not None:
        keep = np.broadcast_to(keep, (rows, q_heads, n)).reshape(rows, kv_heads, group, n)
        keep = np.moveaxis(keep, 0, 2)
    logits = attention_logits(grouped, keys[:, None], scale, softcap)
    part = softmax_partial(logits, values[:, None], keep)
    return PartialAttention(
        np.moveaxis(part.output, 2, 0).reshape(rows, q_heads, -1),
        np.moveaxis(part.lse, 2, 0).reshape(rows, q_heads),
    )


def merge(parts: Sequence[PartialAttention]) -> PartialAttention:
    """Attention over the union of disjoint key sets, from its parts (same shapes)."""
    if len(parts) == 1:
        return parts[0]
    lses = np.array([part.lse for part in parts], np.float32)
    highest = lses.max(axis=0)
    # Where no part saw a key, a finite number keeps -inf - -inf from being NaN.
    shares = np.exp(lses - np.maximum(highest, _LOWEST))
    total = np.maximum(shares.sum(axis=0), np.float32(1))  # the highest alone weighs 1
    shares /= total
    output = shares[0, ..., None] * parts[0].output
    for share, part in zip(shares[1:], parts[1:], strict=True):
        output += share[..., None] * part.output
    return PartialAttention(np.asarray(output, np.float32), np.log(total) + highest)
