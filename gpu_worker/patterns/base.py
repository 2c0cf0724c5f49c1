"""What a sparse prefill pattern is: a choice of key blocks and key columns per query block.

A pattern only selects. One index (`Selection`) serves all patterns, one torch reference defines
what a selection means, and executors attend it fast. Queries come in chunks; a pattern that needs
the whole prompt (the published vertical-slash probes the prompt's last queries) declares it and is
given the last queries and all keys of the layer first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from longreach.registry import Registry

KEY_BLOCK = 64
"""Keys in a block."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What the queries of one chunk attend, per query head, always under the causal rule.

    blocks: bool [q_heads, query_blocks, key_blocks]; a query block is `query_block` rows of the
    chunk, a key block KEY_BLOCK positions from 0. columns: int64 [q_heads, query_blocks, c] single
    positions, ascending, padded with -1; a column inside a selected block counts once.
    mean_correction: every block wholly in the past and not selected enters as one key, its mean
    key and mean value, with the logarithm of the number of its keys that are not attended as
    columns added to the logit.
    pairs: bool [q_heads, rows, start + rows], in place of everything above: exactly these pairs.
    """

    blocks: Tensor
    query_block: int = KEY_BLOCK
    columns: Tensor | None = None
    mean_correction: bool = False
    pairs: Tensor | None = None

    @classmethod
    def of_pairs(cls, pairs: Tensor) -> Selection:
        """A selection of single pairs, for reference patterns: no executor saves time with it."""
        return cls(pairs.new_zeros(pairs.shape[0], 0, 0), pairs=pairs)


@dataclass(frozen=True, slots=True)
class PatternResult:
    """output [q_heads, rows, value_dim] fp32, lse [q_heads, rows] fp32 (natural log), and the
    (row, key) pairs attended and causally visible, whose ratio is the true density."""

    output: Tensor
    lse: Tensor
    pairs_attended: int
    pairs_visible: int

    @property
    def density(self) -> float:
        """Pairs attended / pairs visible."""
        return self.pairs_attended / max(1, self.pairs_visible)


class Pattern(ABC):
    """Chooses which keys the queries of a chunk attend."""

    name: ClassVar[str]
    needs: ClassVar[Literal["chunk", "prompt"]] = "chunk"
    """Whether a chunk alone suffices or the layer's whole prompt must be probed first."""

    def probe(self, q_last: Tensor, k: Tensor, scale: float) -> object:
        """State from the prompt's last queries [q_heads, p, d] and all keys [kv_heads, n, d]."""
        return None

    @abstractmethod
    def select(
        self, q: Tensor, k: Tensor, start: int, total: int, scale: float, state: object
    ) -> Selection | None:
        """Selection for queries q [q_heads, rows, d] at positions [start, start + rows) of a
        prompt of `total` tokens, with keys k [kv_heads, start + rows, d]. None means dense."""

    def for_layer(self, layer: int) -> Pattern:
        """The pattern that serves a layer; most treat all layers alike."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


PATTERNS: Registry[type[Pattern]] = Registry("prefill pattern")
"""Every pattern by name."""


def block_grid(rows: int, start: int, query_block: int) -> tuple[int, int, Tensor]:
    """(query blocks, key blocks, causal bool [query blocks, key blocks]) of a chunk.

    A key block is causal for a query block when its first key is no later than the block's last
    row.
    """
    query_blocks = -(-rows // query_block)
    key_blocks = -(-(start + rows) // KEY_BLOCK)
    last_row = start + (torch.arange(query_blocks) + 1) * query_block - 1
    last_row = last_row.clamp(max=start + rows - 1)
    return query_blocks, key_blocks, torch.arange(key_blocks)[None] * KEY_BLOCK <= last_row[:, None]


def diagonal_blocks(rows: int, start: int, query_block: int, width: int = 0) -> Tensor:
    """Bool [query blocks, key blocks]: blocks that hold the rows themselves, and `width` tokens
    before them."""
    query_blocks, key_blocks, causal = block_grid(rows, start, query_block)
    first_row = start + torch.arange(query_blocks) * query_block
    ends = (torch.arange(key_blocks) + 1) * KEY_BLOCK
    return causal & (ends[None] > (first_row - width)[:, None])


def left_out_keys(selection: Selection, start: int, whole: int) -> Tensor:
    """How many keys of each of the first `whole` blocks enter as the block's mean: fp32
    [q_heads, query_blocks, whole], 0 for blocks that are attended or not wholly in the past."""
    blocks = selection.blocks[:, :, :whole]
    device = blocks.device
    first_row = start + torch.arange(blocks.shape[1], device=device) * selection.query_block
    past = (torch.arange(whole, device=device) + 1) * KEY_BLOCK <= first_row[:, None]
    keys = torch.full(blocks.shape, float(KEY_BLOCK), device=device)
    if selection.columns is not None and whole:
        columns = selection.columns
        wanted = columns.clamp(min=0) // KEY_BLOCK
        one = ((columns >= 0) & (wanted < whole)).float()
        keys.scatter_add_(2, wanted.clamp(max=whole - 1), -one)
    return keys * (~blocks & past)


def attend_chunk(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    total: int,
    scale: float,
    state: object = None,
) -> PatternResult:
    """Selects and attends one chunk: q [q_heads, rows, d], k and v [kv_heads, start + rows, ·]."""
    from gpu_worker.patterns.executor import attend_selection

    selection = pattern.select(q, k, start, total, scale, state)
    return attend_selection(q, k, v, start, scale, selection)
