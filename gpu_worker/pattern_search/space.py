"""The published search space (MInference 1.0, section 3.2 and appendix C.2)."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.patterns.base import KEY_BLOCK
from gpu_worker.patterns.head_choices import HeadChoice

PUBLISHED_TOKENS = 30_000
"""Length of the published calibration prompt; on shorter ones the space shrinks in proportion."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pattern with its published sizes: what the search calls `name`."""

    pattern: str
    sizes: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """As published: "vertical_slash(30, 2048)"."""
        return f"{self.pattern}({', '.join(str(size) for _, size in self.sizes)})"

    def scaled(self, factor: float) -> HeadChoice:
        """Sizes times `factor`: at least 1, and whole blocks where the pattern has blocks."""
        unit = KEY_BLOCK if self.pattern == "a_shape" else 1
        return HeadChoice(
            self.pattern,
            tuple(
                (name, max(unit, round(size * factor / unit) * unit)) for name, size in self.sizes
            ),
        )


def _vertical_slash(verticals: int, slashes: int) -> Candidate:
    return Candidate("vertical_slash", (("verticals", verticals), ("slashes", slashes)))


TARGET = Candidate("a_shape", (("sink_tokens", 1024), ("window_tokens", 4096)))
"""Its measured cost is what every candidate may cost."""

SPACE = (
    TARGET,
    _vertical_slash(30, 2048),
    _vertical_slash(100, 1800),
    _vertical_slash(500, 1500),
    _vertical_slash(3000, 200),
    Candidate("block_sparse", (("top_blocks", 100),)),
)
"""Every candidate, the target first."""


def space_scale(tokens: int) -> float:
    """Factor of the published sizes for a calibration prompt of `tokens` tokens; at most 1."""
    return min(1.0, tokens / PUBLISHED_TOKENS)
