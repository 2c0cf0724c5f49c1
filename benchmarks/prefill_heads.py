"""Synthetic prefill heads with the structures that MInference reports in trained models.

Each query head mixes, with its own weights: locality (rotary positions, so that logits fall with
distance), an attention sink, a few vertical keys that every query likes, and topics: runs of text
that a later query may look for. Values are independent noise plus the topic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TOPIC_TOKENS = 192
VERTICAL_SHARE = 0.003


@dataclass(frozen=True, slots=True)
class Heads:
    """q [q_heads, n, d], k and v [kv_heads, n, d]."""

    q: Tensor
    k: Tensor
    v: Tensor


def rotary(n: int, d: int, base: float = 1e6) -> Tensor:
    """Unit vectors [n, d] whose dot product depends on the distance only and falls with it."""
    frequency = base ** (-torch.arange(d // 2) / (d // 2))
    angle = torch.arange(n)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1) / math.sqrt(d // 2)


def make_heads(
    n: int, q_heads: int, kv_heads: int, d: int, dtype: torch.dtype, seed: int = 0
) -> Heads:
    """Heads over n positions; logits q·k / sqrt(d) have a standard deviation of a few units."""
    g = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize
    topics = -(-n // TOPIC_TOKENS)
    topic = torch.arange(n) // TOPIC_TOKENS
    # What a query looks for: mostly its own topic, sometimes an earlier one.
    back = (torch.rand(n, generator=g) ** 3 * (topic + 1)).long()
    wanted = torch.where(torch.rand(n, generator=g) < 0.3, topic - back, topic).clamp(min=0)
    local = rotary(n, d)
    keys, values, queries = [], [], []
    for _ in range(kv_heads):
        common = unit(torch.randn(d, generator=g), dim=0)
        directions = unit(torch.randn(topics, d, generator=g), dim=-1)
        vertical = (torch.rand(n, generator=g) < VERTICAL_SHARE).float()
        vertical[:4] = 2.0
        noise = torch.randn(n, d, generator=g) / math.sqrt(d)
        keys.append(local + directions[topic] + vertical[:, None] * common + 0.5 * noise)
        values.append(torch.randn(n, d, generator=g) + directions[topic] * 2)
        for head in range(q_heads // kv_heads):
            weight = 4 + 8 * torch.rand(3, generator=g)
            weight[head % 3] += 12
            q = weight[0] * local + weight[1] * common + weight[2] * directions[wanted]
            queries.append(q + torch.randn(n, d, generator=g) / math.sqrt(d))
    scale = math.sqrt(d) ** 0.5
    return Heads(
        *((torch.stack(x) * s).to(dtype) for x, s in ((queries, scale), (keys, scale), (values, 1)))
    )
