"""Is a method worse than full attention? Paired comparison on the same samples, with intervals.

A score is in [0, 1] per question. An interval of a difference spans two: a bootstrap that resamples
haystacks, because questions over one haystack are not independent, and Newcombe's interval from the
shares of gains and losses, because a bootstrap over equal answers would claim certainty. McNemar's
exact test counts questions that only one of the two answered in full.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, norm

from longreach.types import IntArray

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval of 95%."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method beside full attention, over n questions both answered.

    difference: mean score minus full attention's; `interval` is of it. better, worse: questions
    answered in full by only one of the two. p_value: McNemar's exact test, two-sided.
    """

    n: int
    mean: float
    full_mean: float
    difference: float
    interval: Interval
    better: int
    worse: int
    p_value: float


def wilson(mean: float, n: int) -> Interval:
    """Wilson's interval of a share `mean` of n independent answers.

    Scores between 0 and 1 vary at most as much as a share, so for them it is rather too wide.
    """
    if n == 0:
        return Interval(0.0, 1.0)
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * float(np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)))
    return Interval(max(0.0, centre - reach), min(1.0, centre + reach))


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p-value that neither of two methods is right more often.

    better, worse: how many answers only the one, only the other got right.
    """
    if better + worse == 0:
        return 1.0
    return min(1.0, 2 * float(binom.cdf(min(better, worse), better + worse, 0.5)))


def paired_bootstrap(
    differences: Sequence[float], groups: Sequence[Hashable], seed: int = 0
) -> Interval:
    """Percentile interval of the mean difference; questions of one group are drawn together.

    With a single group there is nothing to resample: then single questions are drawn, and the
    interval holds for that haystack only.
    """
    codes = _codes(groups)
    if codes.size and codes.max() == 0:
        codes = np.arange(len(differences))
    values = np.asarray(differences, dtype=np.float64)
    sums = np.bincount(codes, weights=values)
    counts = np.bincount(codes)
    drawn = np.random.default_rng(seed).multinomial(
        len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES
    )
    means = (drawn @ sums) / (drawn @ counts)
    low, high = np.quantile(means, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Interval(float(low), float(high))


def gains_and_losses(differences: Sequence[float]) -> Interval:
    """Newcombe's interval of a mean difference: Wilson's of mean gain and mean loss, combined.

    Newcombe 1998 (square-and-add), without its correction for the correlation of the two, so that
    it is rather too wide.
    """
    n = len(differences)
    gain = sum(max(0.0, each) for each in differences) / n
    loss = sum(max(0.0, -each) for each in differences) / n
    gains, losses = wilson(gain, n), wilson(loss, n)
    down = float(np.hypot(gain - gains.low, losses.high - loss))
    up = float(np.hypot(gains.high - gain, loss - losses.low))
    return Interval(gain - loss - down, gain - loss + up)


def compare(
    scores: Sequence[float],
    full_scores: Sequence[float],
    groups: Sequence[Hashable],
    seed: int = 0,
) -> Comparison:
    """Compares scores of the same questions; `groups` names each question's haystack.

    Raises ValueError for no questions or sequences of different lengths.
    """
    if not scores or not len(scores) == len(full_scores) == len(groups):
        raise ValueError(
            f"{len(scores)} scores, {len(full_scores)} of full attention and {len(groups)} groups; "
            "a paired comparison needs as many of each, and at least one"
        )
    pairs = list(zip(scores, full_scores, strict=True))
    better = sum(own == 1 > full for own, full in pairs)
    worse = sum(full == 1 > own for own, full in pairs)
    differences = [own - full for own, full in pairs]
    drawn, shares = paired_bootstrap(differences, groups, seed), gains_and_losses(differences)
    return Comparison(
        n=len(pairs),
        mean=float(np.mean(scores)),
        full_mean=float(np.mean(full_scores)),
        difference=float(np.mean(differences)),
        interval=Interval(min(drawn.low, shares.low), max(drawn.high, shares.high)),
        better=better,
        worse=worse,
        p_value=mcnemar(better, worse),
    )


def _codes(groups: Sequence[Hashable]) -> IntArray:
    """Groups as numbers from 0 on, in order of appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
