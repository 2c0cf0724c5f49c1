"""Whether an answer is the fault-free one: pure functions over token ids and margins.

Greedy answers must be equal token by token. Where the fault-free model was torn between two tokens
(their logits within NEAR_TIE of each other), rounding may decide either way and everything after it
differs too: such answers are counted apart, as near ties.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NEAR_TIE = 1e-2
"""Largest difference of the two best logits that rounding may turn around."""
FOREIGN_RUN = 8
"""So many tokens in a row of another answer, where the own one says otherwise, are no accident."""


class Verdict(enum.Enum):
    """What became of a request."""

    EQUAL = "equal"
    NEAR_TIE = "near tie"
    WRONG = "wrong"
    FOREIGN = "foreign"
    FAILED = "failed"


@dataclass(frozen=True)
class Reference:
    """The fault-free answer: token ids, and how far the best logit was above the second best."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.margins) > 0


def judge(tokens: Sequence[int], own: Reference, others: Iterable[Reference] = ()) -> Verdict:
    """Compares a finished answer with its reference; `others` are answers of other contexts."""
    first = first_difference(tokens, own.tokens)
    if first is None:
        return Verdict.EQUAL
    if any(_shares_run(tokens, own.tokens, other.tokens) for other in others):
        return Verdict.FOREIGN
    if first < min(len(tokens), len(own.tokens)) and own.margins[first] <= NEAR_TIE:
        return Verdict.NEAR_TIE
    return Verdict.WRONG


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """The first position at which two sequences differ, the end of the shorter one included."""
    for position, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return position
    return None if len(left) == len(right) else min(len(left), len(right))


def _shares_run(tokens: Sequence[int], own: Sequence[int], other: Sequence[int]) -> bool:
    """Whether FOREIGN_RUN tokens in a row are another answer's and not the own one's."""
    length = min(len(tokens), len(own), len(other))
    for start in range(length - FOREIGN_RUN + 1):
        run = slice(start, start + FOREIGN_RUN)
        if list(tokens[run]) == list(other[run]) != list(own[run]):
            return True
    return False
