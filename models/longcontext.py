"""Full attention over long contexts on a CPU: chunked prefill, then questions on a shared cache.

It runs the modules of a Hugging Face Qwen3 model, unchanged, with two differences from calling the
model: keys and values go to one preallocated cache, and a chunk's attention is the merge of a
causal part (the chunk) and a dense part (the cache) by their log-sum-exps, so that PyTorch's flash
kernel computes both and no mask of prompt size is ever made. Nothing is left out or approximated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class LongContext:
    """A model with one growing context of at most `tokens_max` tokens.

    The cache takes 2 x layers x kv_heads x head_dim numbers of the model's dtype per token.
    """

    def __init__(self, model: Qwen3ForCausalLM, tokens_max: int) -> None:
        config = model.config
        self.model = model
        self.length = 0
        shape = (
            config.num_hidden_layers, 1, config.num_key_value_heads, tokens_max, config.head_dim
        )  # fmt: skip
        self._keys = torch.zeros(shape, dtype=model.dtype)
        self._values = torch.zeros(shape, dtype=model.dtype)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], chunk_tokens: int = 2048) -> None:
        """Appends `ids` to the context.

        Raises ValueError if they do not fit.
        """
        for start in range(0, len(ids), chunk_tokens):
            self._append(ids[start : start + chunk_tokens], with_output=False)

    @torch.inference_mode()
    def predict(self, ids: Sequence[int]) -> list[int]:
        """For each token of `ids` after the context, the greedy next token; the context stays.

        `predict(prompt + answer)` tells at once whether greedy decoding after `prompt` gives
        `answer`: it does exactly if the prediction at every place before an answer token is it.
        """
        length = self.length
        hidden = self._append(ids, with_output=True)
        self.length = length
        best: list[int] = self.model.lm_head(hidden)[0].argmax(-1).tolist()
        return best

    def _append(self, ids: Sequence[int], with_output: bool) -> Tensor:
        start, stop = self.length, self.length + len(ids)
        if stop > self._keys.shape[3]:
            raise ValueError(
                f"{stop} tokens exceed the context of {self._keys.shape[3]}; "
                "make LongContext with a larger tokens_max"
            )
        decoder = self.model.model
        x = decoder.embed_tokens(torch.tensor([ids]))
        rotation = decoder.rotary_emb(x, torch.arange(start, stop)[None])
        self.length = stop
        for index, layer in enumerate(decoder.layers):
            q, k, v = _project(layer.self_attn, layer.input_layernorm(x), rotation)
            self._keys[index, :, :, start:stop] = k
            self._values[index, :, :, start:stop] = v
            if index == len(decoder.layers) - 1 and not with_output:
                break
            past = (self._keys[index, :, :, :start], self._values[index, :, :, :start])
            out = _attend(q, (k, v), past)
            x = x + layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        hidden: Tensor = decoder.norm(x)
        return hidden


def _project(
    attention: torch.nn.Module, x: Tensor, rotation: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, each [1, heads, tokens, head_dim]."""
    shape = (*x.shape[:2], -1, attention.head_dim)
    q = attention.q_norm(attention.q_proj(x).view(shape)).transpose(1, 2)
    k = attention.k_norm(attention.k_proj(x).view(shape)).transpose(1, 2)
    v = attention.v_proj(x).view(shape).transpose(1, 2)
    cos, sin = (part[:, None] for part in rotation)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _attend(q: Tensor, chunk: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor]) -> Tensor:
    """Attention of a chunk's queries [1, heads, T, d] over the past and, causally, the chunk."""
    _, heads, tokens, dim = q.shape
    kv_heads = chunk[0].shape[1]
    group = heads // kv_heads
    k, v = (part.repeat_interleave(group, 1) for part in chunk)
    near, near_lse = _flash(q, k, v, 0.0, True)
    if past[0].shape[2] == 0:
        return near
    # Query heads that share a key-value head are stacked along the token axis: no copy of the past.
    stacked = q.reshape(1, kv_heads, group * tokens, dim)
    far, far_lse = _flash(stacked, past[0], past[1], 0.0, False)
    far, far_lse = far.reshape(q.shape), far_lse.reshape(1, heads, tokens)
    share = torch.sigmoid(far_lse.float() - near_lse.float())[..., None].to(q.dtype)
    merged: Tensor = near * (1 - share) + far * share
    return merged
