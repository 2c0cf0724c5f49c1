"""How the telemetry benchmark judges: against the same round, with its own noise beside it."""

from __future__ import annotations

import pytest

from benchmarks.report import Report
from benchmarks.telemetry import ARMS, TRACED, Block, overheads, report_on


def measured(on: float) -> dict[str, list[Block]]:
    """Three rounds, of which the second was disturbed: everything took three times as long."""
    slow = (1.0, 3.0, 1.0)
    factors = dict(zip(ARMS, (0.99, on, 1.01), strict=True))
    return {arm: [Block(10 * f * s, 8 * f) for s in slow] for arm, f in factors.items()}


def test_a_round_that_was_disturbed_as_a_whole_changes_nothing() -> None:
    found = overheads(measured(1.015), "token_ms")
    assert found["on"] == pytest.approx(0.015)
    assert found["off"] == pytest.approx(-0.01)
    assert overheads(measured(1.015), "cpu_ms")["on"] == pytest.approx(0.015)


@pytest.mark.parametrize(("on", "met"), [(1.015, True), (1.025, False)])
def test_the_target_is_two_percent(on: float, met: bool) -> None:
    report = Report("telemetry", config={})
    traced = {arm: [Block(1.0, 1.0)] for arm in TRACED}
    report_on(measured(on), traced, 7, {"histogram, on": 0.5}, report)
    for target in report.targets:
        assert target.met is met
        assert "differ by 0.020" in target.note
    assert {row["what"] for row in report.results} >= {"telemetry on", TRACED[1], "histogram, on"}
