"""Quest (Tang et al., arXiv 2406.10774): per query head and token the `budget` tokens in the pages
of `page` tokens whose elementwise key bounds allow the highest logits; `dense_layers` first layers
are attended in full.

A page's score is sum_i max(q_i min_i, q_i max_i), an upper bound of its logits. Tokens after the
context are all attended, as the paper always attends the newest page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from library.decode.base import (
    DECODE_METHODS,
    DecodeMethod,
    Found,
    LayerContext,
    Search,
    at_least,
    between,
    sink_and_window,
)
from library.decode.gathered import attend_blocks, attend_rows, distinct, overlaps, read_in_full
from longreach.types import Span, WorkFigures


@DECODE_METHODS.register("quest")
@dataclass(frozen=True)
class Quest(DecodeMethod):
    """Top pages by their key bounds."""

    budget: int = 2048
    page: int = 16
    dense_layers: int = 2

    name = "quest"

    def __post_init__(self) -> None:
        at_least(1, page=self.page)
        at_least(self.page, budget=self.budget)
        at_least(0, dense_layers=self.dense_layers)

    def resident(self, context: int, seen: int) -> list[slice]:
        """What was fed after the context."""
        return sink_and_window(0, 0, context, seen)

    def scope(self, context: int, seen: int) -> Span:
        """The whole context."""
        return between(self.resident(context, seen), context)

    def prepare(self, layer: LayerContext) -> Search | None:
        """Bounds of every page; none in the first layers."""
        if layer.geometry.layer < self.dense_layers:
            return WholeScope(layer)
        low, high = layer.once(("pages", self.page), lambda: page_bounds(layer.keys, self.page))
        return Pages(self, layer, low, high)


def page_bounds(keys: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Elementwise lowest and highest [kv_heads, pages, d] of keys; the last page may be short."""
    pad = -keys.shape[1] % page
    # The last key again changes neither bound.
    padded = torch.cat([keys, keys[:, -1:].expand(-1, pad, -1)], 1)
    pages = padded.unflatten(1, (-1, page))
    return pages.amin(2), pages.amax(2)


@dataclass
class Pages(Search):
    """Bounds [kv_heads, pages, d] of a layer's pages."""

    method: Quest
    layer: LayerContext
    low: torch.Tensor
    high: torch.Tensor

    @property
    def held(self) -> int:  # type: ignore[override]
        """Every key: Quest saves reading, not room."""
        return self.layer.geometry.kv_heads * self.layer.tokens

    def attend(self, queries: torch.Tensor, scope: Span) -> Found:
        """Attention over each row's best pages."""
        page, kv_heads = self.method.page, self.layer.geometry.kv_heads
        held = overlaps(self.low.shape[1], page, scope, queries.device)
        scores = self.scores(queries).masked_fill(held == 0, -torch.inf)
        count = min(self.method.budget // page, int((held > 0).sum()))
        best = scores.topk(count, dim=-1).indices
        partial = attend_blocks(
            queries, self.layer.keys, self.layer.values, best, page, scope, self.layer.call
        )
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(
            -1, best, torch.ones_like(best, dtype=torch.bool)
        )
        pairs = int((distinct(chosen, kv_heads) * held).sum())
        rows = kv_heads * queries.shape[1]
        bounds = 2 * int(self.low.shape[1] * self.low.shape[2] * self.low.element_size())
        work = read_in_full(pairs, self.layer.row_bytes) + WorkFigures(
            keys_sketched=rows * len(scope), bytes_read=rows * bounds
        )
        return Found(partial, work)

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """Upper bounds [q_heads, T, pages] of the logits over each page, before the scale."""
        grouped = queries.float().unflatten(0, (self.low.shape[0], -1))
        positive, negative = functional.relu(grouped), functional.relu(-grouped)
        high = self.high.float().transpose(1, 2)[:, None]
        low = self.low.float().transpose(1, 2)[:, None]
        return (positive @ high - negative @ low).flatten(0, 1)


@dataclass
class WholeScope(Search):
    """Every key of the scope."""

    layer: LayerContext

    @property
    def held(self) -> int:  # type: ignore[override]
        """Every key."""
        return self.layer.geometry.kv_heads * self.layer.tokens

    def attend(self, queries: torch.Tensor, scope: Span) -> Found:
        """Attention over all of it."""
        part = slice(scope.start, scope.stop)
        keys, values = self.layer.keys[:, part], self.layer.values[:, part]
        pairs = self.layer.geometry.kv_heads * queries.shape[1] * len(scope)
        partial = attend_rows(queries, keys, values, self.layer.call)
        return Found(partial, read_in_full(pairs, self.layer.row_bytes))
