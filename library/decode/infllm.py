"""InfLLM (Xiao et al., arXiv 2402.04617): `sink` first and `window` last tokens, and of the blocks
of `block` tokens between them the `blocks` most relevant to the tokens being fed.

A block is known by its `representatives`: the tokens with the highest mean logit under the queries
of the `window` tokens after each. Relevance is the sum of q·k over the layer's heads, the fed
tokens and the representatives, so that all heads of a layer attend the same blocks. Heads that
share a KV head vote together for its representatives (the paper has no such groups), and keys keep
the rotary positions of the text, where the paper gives all far tokens one position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
from library.decode.gathered import attend_rows, overlaps, read_in_full, take
from longreach.errors import FailedPrecondition
from longreach.types import Span, WorkFigures


@DECODE_METHODS.register("infllm")
@dataclass(frozen=True)
class InfLLM(DecodeMethod):
    """Whole blocks by their representatives."""

    sink: int = 128
    window: int = 4096
    block: int = 128
    blocks: int = 96
    representatives: int = 4

    name = "infllm"
    needs_every_query = True

    def __post_init__(self) -> None:
        at_least(0, sink=self.sink)
        at_least(1, window=self.window, block=self.block, blocks=self.blocks)
        at_least(1, representatives=self.representatives)

    def resident(self, context: int, seen: int) -> list[slice]:
        """Sink and window, and what was fed after the context."""
        return sink_and_window(self.sink, self.window, context, seen)

    def scope(self, context: int, seen: int) -> Span:
        """The context between them."""
        return between(self.resident(context, seen), context)

    def prepare(self, layer: LayerContext) -> Search | None:
        """Finds the representatives of every block."""
        key = ("representatives", self.block, self.window, self.representatives)
        return Blocks(self, layer, layer.once(key, lambda: self.representative_keys(layer)))

    def representative_keys(self, layer: LayerContext) -> torch.Tensor:
        """Keys [kv_heads, blocks, representatives, d], zero where a last block is shorter."""
        scores = following_scores(layer, self.window)
        count = -(-layer.tokens // self.block)
        pad = count * self.block - layer.tokens
        padded = torch.nn.functional.pad(scores, (0, pad), value=-torch.inf)
        per_block = min(self.representatives, self.block)
        best = padded.unflatten(1, (count, self.block)).topk(per_block, dim=-1)
        starts = torch.arange(count, device=scores.device)[:, None] * self.block
        ids = (best.indices + starts).clamp(max=layer.tokens - 1)
        return take(layer.keys, ids) * (best.values > -torch.inf)[..., None]


def following_scores(layer: LayerContext, window: int) -> torch.Tensor:
    """Mean q·k [kv_heads, n] of each key under the queries of the `window` tokens after it.

    The last token has none after it and scores 0.
    """
    mean = layer.queries.mean
    if mean is None or mean.shape[1] != layer.tokens:
        raise FailedPrecondition(
            "InfLLM chooses representatives by every query of the prompt, and some were not seen; "
            "attach before the prompt is run",
            reason="NO_QUERY_SAMPLE",
        )
    tokens = layer.tokens
    # Differences of long running sums lose digits: fp64.
    sums = torch.nn.functional.pad(mean.double().cumsum(1), (0, 0, 1, 0))
    at = torch.arange(tokens, device=mean.device)
    stop = (at + 1 + window).clamp(max=tokens)
    following = sums[:, stop] - sums[:, at + 1]
    counts = (stop - at - 1).clamp(min=1)
    return ((following * layer.keys).sum(-1) / counts).float()


@dataclass
class Blocks(Search):
    """Representative keys [kv_heads, blocks, r, d] of a layer's blocks."""

    method: InfLLM
    layer: LayerContext
    representatives: torch.Tensor

    def attend(self, queries: torch.Tensor, scope: Span) -> Found:
        """Attention of all rows over the blocks that are most relevant to them together."""
        size, layer = self.method.block, self.layer
        relevance = self.relevance(queries)
        held = overlaps(len(relevance), size, scope, queries.device)
        relevance = relevance.masked_fill(held == 0, -torch.inf)
        count = min(self.method.blocks, int((held > 0).sum()))
        best = relevance.topk(count).indices.sort().values
        ids = (best[:, None] * size + torch.arange(size, device=best.device)).flatten()
        ids = ids[(ids >= scope.start) & (ids < scope.stop)]
        partial = attend_rows(queries, layer.keys[:, ids], layer.values[:, ids], layer.call)
        rows = layer.geometry.kv_heads * queries.shape[1]
        looked = self.representatives[0].numel() * self.representatives.element_size()
        work = read_in_full(rows * len(ids), layer.row_bytes) + WorkFigures(
            keys_sketched=rows * len(scope), bytes_read=rows * looked
        )
        return Found(partial, work)

    def relevance(self, queries: torch.Tensor) -> torch.Tensor:
        """Sum of q·k [blocks] over heads, rows and representatives."""
        per_head = queries.float().sum(1).unflatten(0, (self.representatives.shape[0], -1)).sum(1)
        return torch.einsum("hd,hbrd->b", per_head, self.representatives.float())
