"""Dilated window (Longformer, Beltagy et al., arXiv 2004.05150): `sink` first tokens, and of the
last `window` tokens every (`interval` + 1)-th, counted back from the newest.

The defaults are those of MInference's comparison (arXiv 2407.02490, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from library.decode.base import DECODE_METHODS, DecodeMethod, at_least


@DECODE_METHODS.register("dilated")
@dataclass(frozen=True)
class Dilated(DecodeMethod):
    """Sink and a window with gaps."""

    sink: int = 1024
    window: int = 8192
    interval: int = 1

    name = "dilated"

    def __post_init__(self) -> None:
        at_least(0, sink=self.sink, window=self.window, interval=self.interval)

    def resident(self, context: int, seen: int) -> list[slice]:
        """The first tokens, and every few of the last."""
        first = min(self.sink, seen)
        return [slice(0, first), counted_back(first, self.window, self.interval, seen)]


def counted_back(lowest: int, window: int, interval: int, stop: int) -> slice:
    """Every (interval + 1)-th of the `window` positions before `stop`, from stop - 1 - interval
    downwards, none below `lowest`."""
    step = interval + 1
    start = max(lowest, stop - window)
    return slice(start + (stop - start) % step, stop, step)
