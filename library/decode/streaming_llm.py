"""StreamingLLM (Xiao et al., arXiv 2309.17453): `sink` first and `window` last tokens, no others.

Keys keep the rotary positions of the text, where the paper counts positions inside the cache: the
models compared here were trained for the lengths they are asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from library.decode.base import DECODE_METHODS, DecodeMethod, at_least


@DECODE_METHODS.register("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(DecodeMethod):
    """Sink and window."""

    sink: int = 128
    window: int = 512

    name = "streaming_llm"

    def __post_init__(self) -> None:
        at_least(0, sink=self.sink, window=self.window)

    def resident(self, context: int, seen: int) -> list[slice]:
        """The first and the last tokens, wherever the context ends."""
        first = min(self.sink, seen)
        return [slice(0, first), slice(max(first, seen - self.window), seen)]
