"""A candidate's sizes at the target cost: measured, not counted in FLOPs ("kernel-aware")."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gpu_worker.pattern_search.space import Candidate
from gpu_worker.patterns.head_choices import HeadChoice

STEPS_MAX = 6
_STEP_LIMIT = 4.0


@dataclass(frozen=True, slots=True)
class Sized:
    """A candidate at a size. `factor` of the published sizes; `cost_ratio`: measured cost / target
    cost; `fits`: it costs no more than the target, within the tolerance."""

    candidate: Candidate
    choice: HeadChoice
    factor: float
    cost_ratio: float
    fits: bool


def size_to_cost(
    candidate: Candidate,
    scale: float,
    tokens: int,
    tolerance: float,
    cost_ratio: Callable[[HeadChoice], float],
) -> Sized:
    """The candidate's sizes for which `cost_ratio` is nearest to 1, found in a few measurements.

    The search starts at the published sizes times `scale`, follows the ratio as if cost were
    proportional to size, and halves once the target lies between two sizes. It ends within the
    tolerance, where sizes cannot change any more, or after STEPS_MAX measurements. A candidate that
    keeps the whole prompt and still costs less fits.
    """
    factor, low, high = scale, 0.0, math.inf
    tried: dict[HeadChoice, Sized] = {}
    for _ in range(STEPS_MAX):
        choice = candidate.scaled(factor)
        if choice in tried:
            break
        ratio = cost_ratio(choice)
        tried[choice] = Sized(candidate, choice, factor, ratio, ratio <= 1 + tolerance)
        whole = all(size >= tokens for _, size in choice.parameters)
        if abs(ratio - 1) <= tolerance or (ratio < 1 and whole):
            break
        low, high = (factor, high) if ratio < 1 else (low, factor)
        guess = factor / min(_STEP_LIMIT, max(1 / _STEP_LIMIT, ratio))
        factor = guess if low < guess < high else (low + high) / 2
    return min(tried.values(), key=lambda each: (not each.fits, abs(math.log(each.cost_ratio))))
