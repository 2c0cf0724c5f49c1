"""Partial attention in torch, and the one attention function registered with transformers.

The maths is the twin of longreach.attention: every part is (output, lse), fp32, natural log, and
parts over disjoint keys merge exactly. The registered function is stateless: the cache that a
forward pass was given marks the keys it returns with the object that attends them, so steps of
other sessions may run between two layers or chunks of a prefill.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AttentionInterface

from longreach.errors import Internal

log = logging.getLogger(__name__)

ATTENTION_NAME = "longreach"
"""Name under which transformers finds `registered_attention`.

It has no entry in AttentionMaskInterface, so that models make no mask: longreach packs rows and
masks by stored positions.
"""

_ATTENDER = "longreach_attender"
_QUERY_BLOCK = 256
_KEY_BLOCK = 8192


class Partial(NamedTuple):
    """Attention over some of the keys: output [..., rows, value_dim], lse [..., rows], fp32."""

    output: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What a layer asks of its attention. `sinks` [q_heads]: learned logits that only take mass."""

    scale: float
    softcap: float = 0.0
    sliding_window: int = 0
    sinks: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        sliding_window: int | None,
        sinks: torch.Tensor | None,
    ) -> LayerCall:
        """From what transformers passes to an attention function; None is what it leaves out."""
        return cls(
            scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
            softcap=float(softcap or 0.0),
            sliding_window=int(sliding_window or 0),
            sinks=sinks,
        )


class Attender(Protocol):
    """Attends the keys it was handed by `Cache.update`."""

    def attend(self, queries: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Attention of queries [q_heads, tokens, d]; returns [tokens, q_heads, value_dim]."""


def mark(keys: torch.Tensor, attender: Attender) -> torch.Tensor:
    """Names who attends these keys; the registered attention function finds it there."""
    setattr(keys, _ATTENDER, attender)
    return keys


def registered_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of every layer. query [1, q_heads, T, d]; returns [1, T, q_heads, dv].

    Raises Internal where the model did not pass on the keys that `Cache.update` returned.
    """
    attender: Attender | None = getattr(key, _ATTENDER, None)
    if attender is None:
        raise Internal(
            f"{type(module).__name__} changed the keys after the cache returned them; "
            "this model cannot be served"
        )
    call = LayerCall.of(query, scaling, softcap, sliding_window, s_aux)
    return attender.attend(query[0], call)[None].to(query.dtype), None


AttentionInterface.register(ATTENTION_NAME, registered_attention)


def merge(first: Partial, second: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys."""
    # Where neither saw a key the difference is NaN, and the first's zeros are right.
    share = torch.sigmoid(second.lse - first.lse).nan_to_num_(0.0)
    output = torch.lerp(first.output, second.output, share[..., None])
    return Partial(output, torch.logaddexp(first.lse, second.lse))


def apply_sinks(part: Partial, sinks: torch.Tensor | None) -> torch.Tensor:
    """Output [..., q_heads, value_dim] after attention sinks took their share, lse [..., q_heads].

    A sink is one more logit per query head whose value is zero. It enters once, after the merge.
    """
    if sinks is None:
        return part.output
    share = torch.exp(part.lse - torch.logaddexp(part.lse, sinks.float()))
    return part.output * share[..., None]


def dense_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
) -> Partial:
    """Attention of queries [B, H, R, d] over keys [B, H, N, d], values [B, H, N, dv].

    `bias` (fp32, 0 or -inf) is broadcastable to [B, 1, R, N]; every row must keep at least one key.
    Query heads of a group are folded into R by the caller.
    """
    if softcap == 0.0 and values.shape[-1] == queries.shape[-1] and _flash_serves(queries, bias):
        return _flash(queries, keys, values, scale, causal=False, bias=bias)
    return blockwise_attention(queries, keys, values, scale, softcap, bias)


def blockwise_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
) -> Partial:
    """`dense_attention` in plain operators, any device, any dims; rows may keep no key."""
    total: Partial | None = None
    scaled = queries.float() * scale
    for start in range(0, keys.shape[2], _KEY_BLOCK):
        block = slice(start, start + _KEY_BLOCK)
        logits = scaled @ keys[:, :, block].float().transpose(-1, -2)
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[..., block]
        lse = torch.logsumexp(logits, -1)
        safe = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)
        part = Partial(torch.exp(logits - safe[..., None]) @ values[:, :, block].float(), lse)
        total = part if total is None else merge(total, part)
    assert total is not None, "attention over no keys"
    return total


def causal_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    scale: float,
    softcap: float = 0.0,
    sliding_window: int = 0,
) -> Partial:
    """Attention of the queries at positions [start, start + T) over all keys up to their own.

    queries [q_heads, T, d]; keys [kv_heads, start + T, d] and values [kv_heads, start + T, dv] at
    positions from 0. Returns output [q_heads, T, dv] and lse [q_heads, T].
    """
    kv_heads, stop, _ = keys.shape
    grouped = queries.reshape(kv_heads, -1, *queries.shape[1:])
    windowed = 0 < sliding_window < stop
    if softcap > 0 or windowed or not _flash_serves(queries) or keys.shape != values.shape:
        part = _banded(grouped, keys, values, start, scale, softcap, sliding_window)
    else:
        part = _flash_causal(grouped, keys, values, start, scale)
    return Partial(part.output.flatten(0, 1), part.lse.flatten(0, 1))


def _flash_causal(
    grouped: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, scale: float
) -> Partial:
    """Flash attention over the diagonal block, then over the prefix, merged."""
    kv_heads, group, tokens, _ = grouped.shape

    def shared(x: torch.Tensor) -> torch.Tensor:
        return x[:, None].expand(kv_heads, group, *x.shape[1:])

    part = _flash(grouped, shared(keys[:, start:]), shared(values[:, start:]), scale, causal=True)
    if start == 0:
        return part
    folded = grouped.reshape(1, kv_heads, group * tokens, -1)
    prefix = _flash(folded, keys[None, :, :start], values[None, :, :start], scale, causal=False)
    shape = (kv_heads, group, tokens)
    return merge(part, Partial(prefix.output.reshape(*shape, -1), prefix.lse.reshape(shape)))


def _banded(
    grouped: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    scale: float,
    softcap: float,
    sliding_window: int,
) -> Partial:
    """Causal attention with a softcap or a sliding window, in blocks of query rows."""
    kv_heads, group, tokens, _ = grouped.shape
    outputs, lses = [], []
    for row in range(0, tokens, _QUERY_BLOCK):
        block = grouped[:, :, row : row + _QUERY_BLOCK]
        rows = block.shape[2]
        first, stop = start + row, start + row + rows
        low = max(0, first - sliding_window + 1) if sliding_window else 0
        query_at = torch.arange(first, stop, device=keys.device)[:, None]
        key_at = torch.arange(low, stop, device=keys.device)[None]
        keep = key_at <= query_at
        if sliding_window:
            keep &= key_at > query_at - sliding_window
        part = dense_attention(
            block.reshape(1, kv_heads, group * rows, -1),
            keys[None, :, low:stop],
            values[None, :, low:stop],
            scale,
            softcap,
            bias_of(keep).repeat(group, 1)[None, None],
        )
        outputs.append(part.output.reshape(kv_heads, group, rows, -1))
        lses.append(part.lse.reshape(kv_heads, group, rows))
    return Partial(torch.cat(outputs, 2), torch.cat(lses, 2))


def bias_of(keep: torch.Tensor) -> torch.Tensor:
    """Additive mask of a boolean one: 0 where kept, -inf elsewhere, fp32."""
    return torch.zeros(keep.shape, device=keep.device).masked_fill_(~keep, -math.inf)


def _flash(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    causal: bool,
    bias: torch.Tensor | None = None,
) -> Partial:
    """torch's own flash attention, by the private operators that also return the lse."""
    aten = torch.ops.aten
    if queries.is_cuda:
        output, lse, *_ = aten._scaled_dot_product_flash_attention(
            queries, keys, values, 0.0, causal, False, scale=scale
        )
    else:
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, causal, attn_mask=bias, scale=scale
        )
    return Partial(output.float(), lse.float())


def _flash_serves(queries: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether the flash operator takes these; CUDA's wants 16-bit floats, d <= 256, no bias."""
    if queries.is_cuda:
        dim = queries.shape[-1]
        if queries.dtype is torch.float32 or bias is not None or dim > 256 or dim % 8:
            return False
    return _flash_works(queries.device.type)


@functools.cache
def _flash_works(device: str) -> bool:
    """Whether torch's private flash operator exists there and does what we think it does."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 16, generator=generator).to(device, dtype) for _ in range(3))
    bias = bias_of(torch.ones(40, 40, dtype=torch.bool, device=device).tril())[None, None]
    try:
        answers = [_flash(q, k, v, 0.25, causal=True)]
        if device == "cpu":
            answers.append(_flash(q, k, v, 0.25, causal=False, bias=bias))
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        log.warning("flash attention with lse is not available (%s); using plain operators", error)
        return False
    want = blockwise_attention(q, k, v, 0.25, bias=bias)
    near = 1e-2 if device == "cuda" else 1e-4
    same = all(
        torch.allclose(got, wanted, atol=near)
        for answer in answers
        for got, wanted in zip(answer, want, strict=True)
    )
    if not same:
        log.warning("torch's flash attention disagrees with plain operators; not using it")
    return same
