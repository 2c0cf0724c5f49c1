"""Strided attention (Sparse Transformer, Child et al., arXiv 1904.10509): `sink` first tokens, the
whole last `window` tokens, and of the `dilated` tokens before those every (`interval` + 1)-th.

The defaults are those of MInference's comparison (arXiv 2407.02490, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from library.decode.base import DECODE_METHODS, DecodeMethod, at_least
from library.decode.dilated import counted_back


@DECODE_METHODS.register("strided")
@dataclass(frozen=True)
class Strided(DecodeMethod):
    """Sink, a window, and a window with gaps before it."""

    sink: int = 1024
    window: int = 2048
    dilated: int = 4096
    interval: int = 1

    name = "strided"

    def __post_init__(self) -> None:
        at_least(0, sink=self.sink, window=self.window, dilated=self.dilated)
        at_least(0, interval=self.interval)

    def resident(self, context: int, seen: int) -> list[slice]:
        """First tokens, every few of the middle ones, all of the last."""
        first = min(self.sink, seen)
        local = max(first, seen - self.window)
        return [
            slice(0, first),
            counted_back(first, self.dilated, self.interval, local),
            slice(local, seen),
        ]
