"""How the telemetry benchmark judges: against the same round, with its own noise beside it."""

from __future__ import annotations

import pytest

from benchmarks.report import Report
from benchmarks.telemetry import ARMS, Turn, cpu_overheads, report_on, time_overheads


def measured(on: float, traced: float) -> dict[str, list[Turn]]:
    """Three rounds, of which the second was disturbed: everything took three times as long."""
    slow = (1.0, 3.0, 1.0)
    factors = dict(zip(ARMS, (0.99, 1.01, on, traced), strict=True))
    return {arm: [Turn(10 * f * s, 8 * f) for s in slow] for arm, f in factors.items()}


def test_a_round_that_was_disturbed_as_a_whole_changes_nothing() -> None:
    found = time_overheads(measured(1.015, 1.04))
    assert found["on"] == pytest.approx(0.015)
    assert found["on, every request traced"] == pytest.approx(0.04)
    assert found["off"] == pytest.approx(-0.01)
    assert cpu_overheads(measured(1.015, 1.04))["on"] == pytest.approx(0.015)


@pytest.mark.parametrize(("on", "met"), [(1.015, True), (1.025, False)])
def test_the_target_is_two_percent(on: float, met: bool) -> None:
    report = Report("telemetry", config={})
    report_on(measured(on, 1.0), 7, {"histogram, on": 0.5}, report)
    [target] = report.targets
    assert target.met is met
    assert "differ by 0.020" in target.note
    assert {row["what"] for row in report.results} >= {"telemetry on", "histogram, on"}
