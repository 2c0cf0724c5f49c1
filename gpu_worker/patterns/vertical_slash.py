"""Vertical-slash (MInference 1.0, algorithm 2).

The prompt's last queries are probed: `A = softmax(Q_probe K^T / sqrt(d))`, causal. Columns with the
highest sums become verticals, diagonals with the highest sums become slashes; both hold for every
query block. Slash ranges are widened to whole key blocks, so the true density can exceed what the
budget suggests: it is always counted, never assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.patterns.base import KEY_BLOCK, PATTERNS, Pattern, Selection, block_grid

PROBE_ROWS = 64
FORCED_COLUMNS = 30
FORCED_DIAGONALS = 100


@dataclass(frozen=True, slots=True)
class VerticalSlashIndex:
    """columns [q_heads, v] ascending positions; slashes [q_heads, s] distances from the query."""

    columns: Tensor
    slashes: Tensor


def probe_probabilities(q_last: Tensor, k: Tensor, scale: float) -> Tensor:
    """softmax of the last p queries over all n keys, causal: fp32 [q_heads, p, n]."""
    p, n = q_last.shape[1], k.shape[1]
    expanded = k.float().repeat_interleave(q_last.shape[0] // k.shape[0], 0)
    logits = q_last.float() @ expanded.transpose(1, 2) * scale
    rows = torch.arange(n - p, n, device=k.device)[:, None]
    return logits.masked_fill(torch.arange(n, device=k.device) > rows, -torch.inf).softmax(-1)


def diagonal_sums(probabilities: Tensor) -> Tensor:
    """Sum along each distance from the query: [heads, p, n] → [heads, n], distance 0 first.

    Row r (position n - p + r) has key n - p + r - distance; keys before 0 do not exist.
    """
    heads, p, n = probabilities.shape
    rows = torch.arange(n - p, n, device=probabilities.device)
    keys = rows[:, None] - torch.arange(n, device=probabilities.device)
    gathered = probabilities.gather(2, keys.clamp(min=0).expand(heads, -1, -1))
    return gathered.masked_fill(keys < 0, 0).sum(1)


def force(scores: Tensor, first: int) -> None:
    """Lifts the `first` scores above all others, in descending order, so that a smaller budget
    keeps the nearest diagonals, the rows' own among them. Scores are sums of PROBE_ROWS shares."""
    ahead = scores[:, :first]
    ahead[:] = torch.arange(2 * PROBE_ROWS + first, 2 * PROBE_ROWS, -1)[: ahead.shape[1]]


@PATTERNS.register("vertical_slash")
class VerticalSlash(Pattern):
    """The `verticals` heaviest columns and the `slashes` heaviest diagonals of the probe."""

    name = "vertical_slash"
    needs = "prompt"

    def __init__(self, verticals: int = 1000, slashes: int = 2000) -> None:
        self.verticals = verticals
        self.slashes = slashes

    def probe(self, q_last: Tensor, k: Tensor, scale: float) -> VerticalSlashIndex:
        """Scores columns and diagonals of the last PROBE_ROWS queries."""
        probabilities = probe_probabilities(q_last[:, -PROBE_ROWS:], k, scale)
        n = k.shape[1]
        vertical = probabilities.sum(1)
        force(vertical, FORCED_COLUMNS)
        slash = diagonal_sums(probabilities)
        force(slash, FORCED_DIAGONALS)
        return VerticalSlashIndex(
            vertical.topk(min(self.verticals, n)).indices.sort().values,
            slash.topk(min(self.slashes, n)).indices.sort().values,
        )

    def select(
        self, q: Tensor, k: Tensor, start: int, total: int, scale: float, state: object
    ) -> Selection | None:
        """Slashes as key blocks, verticals as columns of each query block."""
        assert isinstance(state, VerticalSlashIndex), "vertical_slash probes the prompt first"
        rows = q.shape[1]
        query_blocks, key_blocks, causal = block_grid(rows, start, KEY_BLOCK)
        blocks = torch.zeros(q.shape[0], query_blocks, key_blocks, dtype=torch.bool)
        for b in range(query_blocks):
            first = start + b * KEY_BLOCK
            last = min(first + KEY_BLOCK, start + rows) - 1
            low = torch.div(first - state.slashes, KEY_BLOCK, rounding_mode="floor")
            high = torch.div(last - state.slashes, KEY_BLOCK, rounding_mode="floor")
            for touched in (low, high):
                seen = torch.zeros(q.shape[0], key_blocks + 1, dtype=torch.bool)
                seen.scatter_(1, torch.where(touched < 0, key_blocks, touched).cpu(), True)
                blocks[:, b] |= seen[:, :-1]
        columns = state.columns[:, None].expand(-1, query_blocks, -1)
        return Selection((blocks & causal).to(q.device), columns=columns)
