"""The demo model's network: Qwen3, with a training pass in which few tokens stand for many.

Parameters have Hugging Face Qwen3's names below `model.`, so exporting is renaming. The only
difference is that logits are divided by sqrt(hidden size) here, which `export.py` folds into the
final norm. Beside the ordinary `forward` there is `forward_supervised`, the training pass: the last
layer runs for supervised tokens only, and there attends to the keys of all sequences of the batch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.tokenizer import VOCAB_SIZE

DILUTION_DISTANCE = 32
"""Tokens nearer than this always count once: the local heads must not be diluted."""


@dataclass(frozen=True)
class DemoConfig:
    """Shape of the network.

    rope_theta is so large that 15 of the 32 RoPE pairs turn less than 0.7 rad over 128K positions:
    they compare content, not distance.
    """

    vocab_size: int = VOCAB_SIZE
    hidden: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    feed_forward: int = 384
    rope_theta: float = 1e10
    positions_max: int = 262_144

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    def as_dict(self) -> dict[str, int | float]:
        """The fields, for a checkpoint."""
        return asdict(self)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt scale."""

    def __init__(self, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), 1e-6)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        query_dim, key_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, query_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, key_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, key_dim, bias=False)
        self.o_proj = nn.Linear(query_dim, config.hidden, bias=False)
        self.q_norm = RMSNorm(config.head_dim, 1.3)
        self.k_norm = RMSNorm(config.head_dim, 1.3)

    def queries_keys_values(
        self, x: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, heads, T, head_dim], keys and values [B, kv_heads, T, head_dim]."""
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.config.head_dim)
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        return _rotate(q, rotation), _rotate(k, rotation), v

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Causal attention; `mask` is additive, [B, 1, T, T], or None for plain causal."""
        q, k, v = self.queries_keys_values(x, rotation)
        out = F.scaled_dot_product_attention(
            q,
            k.repeat_interleave(self.config.group, 1),
            v.repeat_interleave(self.config.group, 1),
            attn_mask=mask,
            is_causal=mask is None,
        )
        return self.merge_heads(out)

    def merge_heads(self, out: Tensor) -> Tensor:
        """Output projection of [B, heads, T, head_dim]."""
        batch, _, length, _ = out.shape
        merged: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return merged


class FeedForward(nn.Module):
    """Gated feed-forward layer (SwiGLU)."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.feed_forward, bias=False)
        self.down_proj = nn.Linear(config.feed_forward, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One transformer layer."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden)
        self.post_attention_layernorm = RMSNorm(config.hidden)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """[B, T, hidden] to [B, T, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return self.add_feed_forward(x)

    def add_feed_forward(self, x: Tensor) -> Tensor:
        """The second half of the layer."""
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DemoModel(nn.Module):
    """The network. Weights are drawn from torch's global generator; see `priming.prime`."""

    inverse_frequencies: Tensor

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden)
        self.register_buffer("inverse_frequencies", rope_frequencies(config), persistent=False)
        self._draw_weights()

    def _draw_weights(self) -> None:
        for name, weight in self.named_parameters():
            if weight.dim() != 2:
                continue
            if "embed" in name:
                nn.init.normal_(weight, std=0.5)
                continue
            std = 1 / math.sqrt(weight.shape[1])
            if "o_proj" in name or "down_proj" in name:
                std *= 0.5 / math.sqrt(2 * self.config.layers)
            nn.init.normal_(weight, std=std)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, T, head_dim] for positions [B, T], computed in fp32."""
        angles = positions[..., None].float() * self.inverse_frequencies
        angles = torch.cat((angles, angles), -1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Final hidden states [B, T, hidden] for token ids [B, T], causal attention."""
        if positions is None:
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        x = self.embed_tokens(ids)
        rotation = self.rotation(positions, x.dtype)
        for block in self.layers:
            x = block(x, rotation, mask)
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] to [..., vocab_size]; input and output embeddings are one matrix."""
        table = self.embed_tokens.weight.to(hidden.dtype)
        return hidden @ table.t() / math.sqrt(self.config.hidden)

    def forward_supervised(
        self,
        ids: Tensor,
        positions: Tensor,
        dilution: Tensor,
        rows: Tensor,
        neighbour_bias: Tensor,
    ) -> Tensor:
        """Hidden states [B, R, hidden] at the tokens `rows`, with in-batch distractors.

        ids, positions: int64 [B, T]. dilution: [B, T], log of how many tokens each counts for.
        rows: int64 [B, R], the tokens to predict from. neighbour_bias: [B], log of how many tokens
        each token of that sequence counts for to the others; -inf hides the sequence.
        """
        batch, length = ids.shape
        config = self.config
        x = self.embed_tokens(ids)
        rotation = self.rotation(positions, torch.bfloat16)
        mask = dilution_mask(dilution).to(torch.bfloat16)
        *lower, last = self.layers
        for block in lower:
            x = block(x, rotation, mask)

        attention = last.self_attn
        q, k, v = attention.queries_keys_values(last.input_layernorm(x), rotation)
        q = q.gather(2, rows[:, None, :, None].expand(-1, config.heads, -1, config.head_dim))
        joined = (1, config.kv_heads, batch * length, config.head_dim)
        keys = k.transpose(0, 1).reshape(joined).expand(batch, -1, -1, -1)
        values = v.transpose(0, 1).reshape(joined).expand(batch, -1, -1, -1)
        bias = _neighbour_mask(dilution, rows, neighbour_bias).to(q.dtype)
        out = F.scaled_dot_product_attention(
            q,
            keys.repeat_interleave(config.group, 1),
            values.repeat_interleave(config.group, 1),
            attn_mask=bias,
        )
        x = x.gather(1, rows[..., None].expand(-1, -1, config.hidden))
        x = last.add_feed_forward(x + attention.merge_heads(out))
        hidden: Tensor = self.norm(x)
        return hidden


def rope_frequencies(config: DemoConfig) -> Tensor:
    """Radians per position of each RoPE pair, float32 [head_dim / 2], fastest first."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    return config.rope_theta**-exponents


def dilution_mask(dilution: Tensor) -> Tensor:
    """Additive causal mask [B, 1, T, T] that counts far diluted tokens many times.

    Adding log(m) to a logit is the same as repeating its token m times, so a model that still finds
    the needle has learnt margins that survive a softmax over many more keys than it was shown.
    """
    index = torch.arange(dilution.shape[1])
    distance = index[:, None] - index[None, :]
    bias = dilution[:, None, :] * (distance >= DILUTION_DISTANCE)
    return bias.masked_fill(distance < 0, float("-inf"))[:, None]


def _neighbour_mask(dilution: Tensor, rows: Tensor, neighbour_bias: Tensor) -> Tensor:
    """Additive mask [B, 1, R, B * T]: causal within a sequence, `neighbour_bias` for the others."""
    batch, length = dilution.shape
    distance = rows[:, :, None] - torch.arange(length)
    own = dilution[:, None, :] * (distance >= DILUTION_DISTANCE)
    own = own.masked_fill(distance < 0, float("-inf"))
    mask = neighbour_bias[None, None, :, None].expand(batch, rows.shape[1], batch, length).clone()
    diagonal = torch.arange(batch)
    mask[diagonal, :, diagonal] = own
    return mask.reshape(batch, 1, rows.shape[1], batch * length)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin
