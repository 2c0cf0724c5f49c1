"""SnapKV (Li et al., arXiv 2404.14469): each head keeps `capacity` tokens of the prompt: its last
`window`, and those that the window's queries attend most, after pooling over `kernel` neighbours.

`pooling` is max or avg. Capacity, window and kernel default to the paper's LongBench setting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from library.decode.base import DECODE_METHODS, OBSERVED_QUERIES, at_least
from library.decode.observation import ObservedMethod
from longreach.errors import InvalidRequest


@DECODE_METHODS.register("snapkv")
@dataclass(frozen=True)
class SnapKV(ObservedMethod):
    """Keys that the prompt's end votes for, once."""

    capacity: int = 4096
    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    name = "snapkv"

    def __post_init__(self) -> None:
        at_least(1, capacity=self.capacity, window=self.window, kernel=self.kernel)
        if self.window > min(OBSERVED_QUERIES, self.capacity - 1):
            raise InvalidRequest(
                f"window is {self.window}; it must be below capacity ({self.capacity}) and at most "
                f"{OBSERVED_QUERIES}"
            )
        if self.kernel % 2 == 0:
            raise InvalidRequest(f"kernel is {self.kernel}; it must be odd")
        if self.pooling not in ("max", "avg"):
            raise InvalidRequest(f"pooling is {self.pooling!r}; it must be max or avg")

    def choose(self, mass: torch.Tensor) -> torch.Tensor:
        """The highest after pooling; of equals, which max pooling makes, the earliest."""
        around = self.kernel // 2
        if self.pooling == "max":
            votes = functional.max_pool1d(mass[:, None], self.kernel, 1, around)[:, 0]
        else:
            votes = functional.avg_pool1d(mass[:, None], self.kernel, 1, around)[:, 0]
        ordered = votes.sort(dim=-1, descending=True, stable=True).indices
        return ordered[:, : self.capacity - self.window]
