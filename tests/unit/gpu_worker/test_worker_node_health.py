"""When a node is late, given up, left alone and trusted again."""

from __future__ import annotations

import numpy as np
import pytest

from gpu_worker.node_health import (
    DEADLINE_S_UNKNOWN,
    HEDGE_S_MIN,
    HEDGE_S_UNKNOWN,
    HedgeBudget,
    Latency,
    NodeHealth,
)


def well(seconds: float = 0.01, size: int = 10, times: int = 128) -> NodeHealth:
    health = NodeHealth()
    for _ in range(times):
        health.answered(size, seconds)
    return health


def test_percentiles_are_those_of_the_last_answers() -> None:
    drawn = np.random.default_rng(0).gamma(2.0, 0.01, 404)
    latency = Latency()
    for seconds in drawn:
        latency.add(seconds)
    kept = np.sort(drawn[-128:])
    assert latency.p50_s == pytest.approx(np.median(kept), rel=0.05)
    assert kept[-4] <= latency.p99_s <= kept[-1]


def test_a_request_is_late_after_the_99th_percentile_or_three_medians() -> None:
    assert NodeHealth().hedge_after_s(10) == HEDGE_S_UNKNOWN
    assert well(0.01).hedge_after_s(10) == pytest.approx(0.03)
    assert well(0.0001).hedge_after_s(10) == HEDGE_S_MIN
    mixed = well(0.01)
    for _ in range(8):
        for _ in range(15):
            mixed.answered(10, 0.01)
        mixed.answered(10, 0.2)
    assert mixed.hedge_after_s(10) == pytest.approx(0.2)


def test_the_deadline_is_five_times_the_99th_percentile_and_at_least_a_second() -> None:
    assert well(0.01).patience_s(10, replicated=True) == 1.0
    assert well(0.5).patience_s(10, replicated=True) == pytest.approx(2.5)
    # Eight times as large may take eight times as long.
    assert well(0.5).patience_s(13, replicated=True) == pytest.approx(20.0)
    assert NodeHealth().patience_s(10, replicated=True) == DEADLINE_S_UNKNOWN
    assert NodeHealth().patience_s(10, replicated=False) is None
    assert well(0.01).patience_s(10, replicated=False) == 5.0


def test_a_node_that_failed_is_avoided_and_after_three_times_refused_ever_longer() -> None:
    health = well()
    story = []
    now = 100.0
    for _ in range(6):
        health.failed(now, now)
        until = next(d for d in np.arange(0, 400, 0.5) if not health.refused(now + d))
        story.append(until)
        assert health.avoided(now)
        now += 1000.0
    assert story == [0, 0, 5, 10, 20, 40]
    for _ in range(10):
        health.failed(now, now)
        now += 1000.0
    health.failed(now, now)
    assert health.refused(now + 299)
    assert not health.refused(now + 301)
    health.answered(10, 0.01)
    assert not health.avoided(now)
    assert not health.refused(now)


def test_what_one_broken_connection_loses_counts_once() -> None:
    health = well()
    for sent_at in (99.0, 99.5, 99.9):
        health.failed(sent_at, 100.0)
    assert not health.refused(100.0)


def test_a_wrong_answer_is_no_connection_failure() -> None:
    health = well()
    for now in range(100, 110):
        health.misled(float(now))
    assert health.avoided(109.0)
    assert not health.refused(109.0)


def test_a_late_node_is_avoided_until_it_has_answered() -> None:
    health = well()
    health.late += 1
    assert health.avoided(0.0)
    health.late -= 1
    assert not health.avoided(0.0)


def test_hedges_are_two_in_a_hundred() -> None:
    budget = HedgeBudget()
    while budget.take():
        pass
    hedges = 0
    for _ in range(10_000):
        budget.asked()
        hedges += budget.take()
    assert hedges == pytest.approx(200, abs=2)
