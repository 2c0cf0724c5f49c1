"""Full attention: every earlier key. What the other methods are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from library.decode.base import DECODE_METHODS, DecodeMethod


@DECODE_METHODS.register("full")
@dataclass(frozen=True)
class Full(DecodeMethod):
    """Every earlier key."""

    name = "full"

    def resident(self, context: int, seen: int) -> list[slice]:
        """Everything."""
        return [slice(0, seen)]
