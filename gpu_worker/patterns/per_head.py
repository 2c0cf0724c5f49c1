"""MInference's own form (1.0, section 3.2): each query head has the pattern that suits it.

The patterns come from a file that `longreach search-patterns` makes once per model. Heads of one
layer with the same pattern and sizes select together; the layer is then attended in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.patterns.base import KEY_BLOCK, PATTERNS, Pattern, Selection, block_grid
from gpu_worker.patterns.dense import Dense
from gpu_worker.patterns.head_choices import HeadChoice, HeadChoices, read_choices
from longreach.errors import Internal, InvalidRequest


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """Query heads of one layer that share a pattern. `kv_heads`: the keys they select from, so
    that query head i of the group belongs to KV head i // (heads / kv_heads) of these."""

    pattern: Pattern
    heads: Tensor
    kv_heads: Tensor

    def queries(self, q: Tensor) -> Tensor:
        """The group's part of q [q_heads, rows, d]."""
        return q if len(self.heads) == q.shape[0] else q[self.heads.to(q.device)]

    def keys(self, k: Tensor) -> Tensor:
        """The keys of the group's heads, of k [kv_heads, n, d]."""
        everything = torch.equal(self.kv_heads, torch.arange(k.shape[0]))
        return k if everything else k[self.kv_heads.to(k.device)]


def group_heads(choices: Sequence[HeadChoice], kv_heads: int) -> list[HeadGroup]:
    """The heads of a layer by their choice, in the order in which choices first appear."""
    groups = []
    for choice in dict.fromkeys(choices):
        heads = torch.tensor([head for head, each in enumerate(choices) if each == choice])
        owners = heads // (len(choices) // kv_heads)
        distinct, counts = owners.unique(return_counts=True)
        # Patterns take as many query heads for each KV head; where a group has not, every head
        # brings its own copy of the keys.
        even = bool((counts == counts[0]).all())
        groups.append(HeadGroup(choice.build(), heads, distinct if even else owners))
    return groups


class PerHeadLayer(Pattern):
    """The patterns of one layer's heads as one pattern.

    Their selections are one `Selection` for the whole layer. Where all heads together keep every
    block, as on short prompts, it is dense.
    """

    name = "minference"

    def __init__(self, choices: Sequence[HeadChoice], kv_heads: int) -> None:
        self.choices = tuple(choices)
        self.groups = group_heads(choices, kv_heads)

    def select(
        self, q: Tensor, k: Tensor, start: int, total: int, scale: float, state: object
    ) -> Selection | None:
        """Each group's own selection, for queries q [q_heads, rows, d] of all heads."""
        states = state if isinstance(state, tuple) else (None,) * len(self.groups)
        _, _, causal = block_grid(q.shape[1], start, KEY_BLOCK)
        selections = [
            group.pattern.select(group.queries(q), group.keys(k), start, total, scale, each)
            for group, each in zip(self.groups, states, strict=True)
        ]
        return combine(self.groups, selections, q.shape[0], causal.to(q.device))


class ProbingPerHeadLayer(PerHeadLayer):
    """The same, where a head's pattern probes the prompt's last queries."""

    needs = "prompt"

    def probe(self, q_last: Tensor, k: Tensor, scale: float) -> tuple[object, ...]:
        """The state of each group's pattern."""
        return tuple(
            group.pattern.probe(group.queries(q_last), group.keys(k), scale)
            for group in self.groups
        )


def combine(
    groups: Sequence[HeadGroup],
    selections: Sequence[Selection | None],
    q_heads: int,
    causal: Tensor,
) -> Selection | None:
    """One selection of all heads from those of groups; None where nothing is left out.

    `causal` bool [query_blocks, key_blocks]: what a group without a selection attends.
    """
    device = causal.device
    blocks = torch.empty(q_heads, *causal.shape, dtype=torch.bool, device=device)
    widths = [s.columns.shape[-1] for s in selections if s is not None and s.columns is not None]
    columns = None
    if widths:
        columns = torch.full((q_heads, causal.shape[0], max(widths)), -1, device=device)
    for group, selection in zip(groups, selections, strict=True):
        heads = group.heads.to(device)
        blocks[heads] = causal if selection is None else selection.blocks
        if columns is not None and selection is not None and selection.columns is not None:
            missing = columns.shape[-1] - selection.columns.shape[-1]
            columns[heads] = functional.pad(selection.columns, (0, missing), value=-1)
    if bool((blocks | ~causal).all()):
        return None
    return Selection(blocks, columns=columns)


@PATTERNS.register("minference")
class MInference(Pattern):
    """The patterns file of a model. `file`: its path."""

    name = "minference"

    def __init__(self, file: str = "") -> None:
        if not file:
            raise InvalidRequest(
                "pattern minference needs the model's patterns file: minference:file=PATH; "
                "longreach search-patterns makes one"
            )
        self.file = file

    @cached_property
    def head_choices(self) -> HeadChoices:
        """What the file says; read once."""
        return read_choices(Path(self.file))

    def for_layer(self, layer: int) -> Pattern:
        """The patterns of this layer's heads; dense where the file has none."""
        found = self.head_choices
        if layer >= len(found.layers):
            raise InvalidRequest(
                f"the patterns file {self.file} was made for {found.model!r} with "
                f"{len(found.layers)} layers; there is a layer {layer}: make a file for this model "
                "with longreach search-patterns"
            )
        heads = found.layers[layer]
        return Dense() if heads is None else per_head_layer(heads, found.shapes[layer][1])

    def select(
        self, q: Tensor, k: Tensor, start: int, total: int, scale: float, state: object
    ) -> Selection | None:
        """Never asked: every layer has a pattern of its own."""
        raise Internal("minference selects per layer; take for_layer(layer) first")

    def __repr__(self) -> str:
        return f"MInference(file={self.file!r}, digest={self.head_choices.digest})"


def per_head_layer(choices: Sequence[HeadChoice], kv_heads: int) -> PerHeadLayer:
    """The pattern of one layer whose query heads have these choices."""
    probes = any(PATTERNS[choice.pattern].needs == "prompt" for choice in choices)
    return (ProbingPerHeadLayer if probes else PerHeadLayer)(choices, kv_heads)
