"""The attention function and the mask function that an attached model calls.

A mask is never made: padding is told by the two-dimensional attention mask as the caller gave it,
and causality by order. Padding stands on the left, where generate() wants it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from gpu_worker.attention import LayerCall, Partial, apply_sinks, causal_attention
from library.cache import layer_of
from longreach.errors import Internal, InvalidRequest

ATTACHED_NAME = "longreach_attached"
"""Name under which transformers finds both functions."""

_PADDINGS = "longreach_paddings"


def padding_mask(
    *, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """The caller's mask [B, positions] where it hides anything, else None."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask


def attached_attention(
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
    """query [B, q_heads, T, d], key [B, kv_heads, n, d]; returns [B, T, q_heads, value_dim].

    Rows of padding are zero. Raises InvalidRequest for a mask with holes, Internal where the model
    did not pass on the keys that the cache returned.
    """
    call = LayerCall.of(query, scaling, softcap, sliding_window, s_aux)
    layer = layer_of(key)
    if layer is None and not call.sliding_window:
        raise Internal(
            f"{type(module).__name__} changed the keys after the cache returned them; "
            "this model cannot be attached"
        )
    batch, q_heads, tokens, _ = query.shape
    output = query.new_zeros(batch, tokens, q_heads, value.shape[-1])
    query, key, value = query.detach(), key.detach(), value.detach()
    for row, padding in enumerate(left_paddings(attention_mask, batch, key.shape[2])):
        fed = min(tokens, key.shape[2] - padding)
        if fed <= 0:
            continue
        queries = query[row, :, tokens - fed :]
        keys, values = key[row, :, padding:], value[row, :, padding:]
        if layer is None:
            part = _windowed(queries, keys, values, call)
        else:
            part = layer.sequence(row).attend(queries, keys, values, call)
        rows = Partial(part.output.transpose(0, 1), part.lse.transpose(0, 1))
        output[row, tokens - fed :] = apply_sinks(rows, call.sinks).to(query.dtype)
    return output, None


AttentionInterface.register(ATTACHED_NAME, attached_attention)
AttentionMaskInterface.register(ATTACHED_NAME, padding_mask)


def left_paddings(mask: torch.Tensor | None, batch: int, keys: int) -> list[int]:
    """How many of the last `keys` positions of each row are padding; all of it must come first.

    mask [B, positions], true or 1 where there is a token; None where there are tokens everywhere.
    """
    if mask is None:
        return [0] * batch
    if mask.ndim != 2 or mask.shape[1] < keys:
        raise InvalidRequest(
            f"the attention mask has shape {tuple(mask.shape)}; an attached model takes masks "
            f"[batch, positions] of at least {keys} positions"
        )
    # Every layer of a forward pass is given the same tensor: counted once for each length.
    known: dict[int, list[int]] = mask.__dict__.setdefault(_PADDINGS, {})
    if keys not in known:
        present = mask[:, mask.shape[1] - keys :].bool()
        paddings = (~present).cumprod(1).sum(1)
        holes = (present.sum(1) + paddings != keys).nonzero().flatten().tolist()
        if holes:
            raise InvalidRequest(
                f"sequence {holes[0]} of the batch is masked behind its first token; pad on the "
                "left (tokenizer.padding_side = 'left')"
            )
        known[keys] = paddings.tolist()
    return known[keys]


def _windowed(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, call: LayerCall
) -> Partial:
    """A sliding-window layer, which no method changes: its keys are few."""
    start = keys.shape[1] - queries.shape[1]
    return causal_attention(
        queries, keys, values, start, call.scale, call.softcap, call.sliding_window
    )
