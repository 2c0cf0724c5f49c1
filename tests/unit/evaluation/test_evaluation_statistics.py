from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import (
    compare,
    gains_and_losses,
    mcnemar,
    paired_bootstrap,
    wilson,
)


@pytest.mark.parametrize(("right", "n"), [(0, 36), (1, 1), (17, 40), (99, 100), (250, 500)])
def test_wilson_is_scipys_interval(right: int, n: int) -> None:
    expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    found = wilson(right / n, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_nothing_asked_says_nothing() -> None:
    assert (wilson(0.0, 0).low, wilson(0.0, 0).high) == (0.0, 1.0)


@pytest.mark.parametrize(("better", "worse"), [(0, 1), (0, 6), (3, 9), (5, 5), (40, 12)])
def test_mcnemar_is_the_exact_two_sided_binomial_test(better: int, worse: int) -> None:
    expected = stats.binomtest(better, better + worse, 0.5).pvalue
    assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_without_any_difference_sees_none() -> None:
    assert mcnemar(0, 0) == 1.0


def test_gains_and_losses_are_newcombes_interval_for_one_sided_changes() -> None:
    """With losses only, the interval's lower end is Wilson's upper bound of the losses."""
    interval = gains_and_losses([-1.0] * 4 + [0.0] * 36)
    losses = stats.binomtest(4, 40).proportion_ci(0.95, method="wilson")
    gains = stats.binomtest(0, 40).proportion_ci(0.95, method="wilson")
    assert interval.low == pytest.approx(-losses.high)
    assert interval.high == pytest.approx(-0.1 + np.hypot(gains.high, 0.1 - losses.low))


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_samples() -> None:
    differences = np.random.default_rng(1).normal(-0.05, 0.3, 2000)
    interval = paired_bootstrap(list(differences), range(2000))
    reach = 1.96 * differences.std() / np.sqrt(2000)
    assert interval.low == pytest.approx(differences.mean() - reach, abs=0.002)
    assert interval.high == pytest.approx(differences.mean() + reach, abs=0.002)


def test_questions_over_one_haystack_count_as_one_draw() -> None:
    """Ten equal answers per haystack tell no more than one: the interval does not shrink."""
    once = [-1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    single = paired_bootstrap(once, range(8))
    repeated = paired_bootstrap(
        [d for d in once for _ in range(10)], [i for i in range(8) for _ in range(10)]
    )
    apart = paired_bootstrap([d for d in once for _ in range(10)], range(80))
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high))
    assert apart.high - apart.low < 0.5 * (single.high - single.low)


def test_a_comparison_counts_what_only_one_of_the_two_answered() -> None:
    full = [1.0, 1.0, 1.0, 0.0, 0.5, 1.0]
    own = [1.0, 0.0, 0.5, 1.0, 0.5, 1.0]
    found = compare(own, full, list("aabbcc"))
    assert (found.n, found.better, found.worse) == (6, 1, 2)
    assert found.mean == pytest.approx(4 / 6)
    assert found.full_mean == pytest.approx(4.5 / 6)
    assert found.difference == pytest.approx(-0.5 / 6)
    assert found.interval.low <= found.difference <= found.interval.high
    assert found.p_value == pytest.approx(stats.binomtest(1, 3, 0.5).pvalue)


def test_equal_answers_are_no_proof_of_equality() -> None:
    found = compare([1.0] * 36, [1.0] * 36, range(36))
    assert found.difference == 0
    assert found.interval.high == pytest.approx(-found.interval.low)
    assert found.interval.high == pytest.approx(0.0964, abs=1e-4)


def test_the_interval_covers_the_truth_about_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evaluation.statistics.RESAMPLES", 500)
    rng = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        full = (rng.random(60) < 0.9).astype(float)
        own = np.where(rng.random(60) < 0.1, 0.0, full)
        found = compare(list(own), list(full), range(60), seed=trial)
        covered += found.interval.low <= -0.09 <= found.interval.high
    assert covered >= 186


def test_sequences_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="2 scores, 1 of full attention and 2 groups"):
        compare([1.0, 0.0], [1.0], [0, 1])
    with pytest.raises(ValueError, match="at least one"):
        compare([], [], [])
