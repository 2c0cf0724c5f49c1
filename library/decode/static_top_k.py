"""Static top-k (compared in RetrievalAttention, arXiv 2409.10516): each head keeps the `top_k`
tokens of the prompt that its last `window` queries attend most, chosen once, not per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.decode.base import DECODE_METHODS, OBSERVED_QUERIES, at_least
from library.decode.observation import ObservedMethod
from longreach.errors import InvalidRequest


@DECODE_METHODS.register("static_top_k")
@dataclass(frozen=True)
class StaticTopK(ObservedMethod):
    """The critical tokens of the prompt's end, for the whole answer."""

    top_k: int = 1000
    window: int = 64

    name = "static_top_k"

    def __post_init__(self) -> None:
        at_least(1, top_k=self.top_k, window=self.window)
        if self.window > OBSERVED_QUERIES:
            raise InvalidRequest(f"window is {self.window}; it is at most {OBSERVED_QUERIES}")

    def choose(self, mass: torch.Tensor) -> torch.Tensor:
        """The highest."""
        return mass.topk(min(self.top_k, mass.shape[1]), dim=-1).indices
