"""What chaos draws and what it reports, without a cluster."""

from __future__ import annotations

import itertools
import random

from tests.scenarios.chaos import Injected, report
from tests.scenarios.faults import FAULTS, sequence
from tests.scenarios.load import Outcome, Question
from tests.scenarios.verdict import Reference, Verdict

QUESTION = Question("c", (1,), Reference((5,), (1.0,)))


class FinishedLoad:
    """Two streams that had tokens every 0.1 s, one of which was silent from 10.0 to 11.5."""

    def __init__(self, *verdicts: Verdict) -> None:
        self._outcomes = [
            Outcome(QUESTION, "stream-0", 10.0, 10.6 + number, verdict)
            for number, verdict in enumerate(verdicts)
        ]

    def outcomes(self) -> list[Outcome]:
        return self._outcomes

    def stamps(self) -> dict[str, list[float]]:
        steady = [8 + 0.1 * n for n in range(81)]
        return {
            "steady": steady,
            "hit": [stamp for stamp in steady if not 9.99 < stamp < 11.49],
        }


def test_every_round_has_every_kind_once_and_a_seed_gives_the_same_order() -> None:
    count = len(FAULTS)
    drawn = list(itertools.islice(sequence(random.Random(7)), 3 * count))
    assert drawn == list(itertools.islice(sequence(random.Random(7)), 3 * count))
    assert drawn != list(itertools.islice(sequence(random.Random(8)), 3 * count))
    for turn in range(3):
        assert sorted(drawn[turn * count : (turn + 1) * count]) == sorted(FAULTS)


def test_the_report_counts_verdicts_and_gives_each_fault_its_recovery() -> None:
    faults = [Injected("kill node", "node-1", 10.0), Injected("kill redis", "redis", 13.0)]
    load = FinishedLoad(
        Verdict.EQUAL, Verdict.NEAR_TIE, Verdict.WRONG, Verdict.FOREIGN, Verdict.FAILED
    )
    figures = report(faults, 16.0, load, calm_from=8.5, seed=7)  # type: ignore[arg-type]
    assert (figures["faults"], figures["faults_per_minute"], figures["requests"]) == (2, 20.0, 5)
    assert (figures["failed"], figures["wrong"], figures["near_ties"]) == (1, 2, 1)
    assert figures["kinds"]["kill node"] == {"faults": 1, "recovery_max_s": 1.5}
    assert figures["recovery_max_s"] == figures["recovery_p99_s"] == 1.5
    assert figures["recovery_p50_s"] < 0.2
    assert figures["silence_without_faults_max_s"] < 0.2
    during = [bad["during"] for bad in figures["bad"]]
    assert during == ["kill node: node-1", "kill redis: redis", "kill redis: redis"]
