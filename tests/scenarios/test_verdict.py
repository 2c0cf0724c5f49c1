"""The judgement of answers, the time of recoveries and the count of copies, on small examples."""

from __future__ import annotations

import pytest

from longreach.types import Shard, Span
from tests.scenarios.inspection import fewest_copies
from tests.scenarios.recovery import longest_silence, percentile, recovery_s
from tests.scenarios.verdict import Reference, Verdict, judge

OWN = Reference(tuple(range(100, 120)), (1.0,) * 5 + (0.009,) + (1.0,) * 14)
OTHER = Reference(tuple(range(200, 220)), (1.0,) * 20)


@pytest.mark.parametrize(
    ("tokens", "verdict"),
    [
        (OWN.tokens, Verdict.EQUAL),
        ((*OWN.tokens[:5], 7, 8, 9, *OWN.tokens[8:]), Verdict.NEAR_TIE),
        ((*OWN.tokens[:4], 7, *OWN.tokens[5:]), Verdict.WRONG),
        (OWN.tokens[:-1], Verdict.WRONG),
        (OWN.tokens[:5], Verdict.WRONG),  # Ends at the near tie: no token was chosen there.
        ((*OWN.tokens, 7), Verdict.WRONG),
        ((), Verdict.WRONG),
        (OTHER.tokens, Verdict.FOREIGN),
        ((*OWN.tokens[:5], *OTHER.tokens[5:]), Verdict.FOREIGN),  # Even from a near tie on.
        ((*OWN.tokens[:13], *OTHER.tokens[13:]), Verdict.WRONG),  # Too short a run to be sure.
    ],
)
def test_an_answer_is_compared_with_its_own_and_with_other_contexts(
    tokens: tuple[int, ...], verdict: Verdict
) -> None:
    assert judge(tokens, OWN, [OTHER]) is verdict


def test_silence_is_counted_from_the_fault_to_the_next_token() -> None:
    stamps = [1.0, 9.9, 10.1, 13.0, 13.5]
    assert longest_silence(stamps, 10.0, 14.0) == pytest.approx(2.9)
    assert longest_silence(stamps, 10.2, 14.0) == pytest.approx(2.8)
    assert longest_silence([], 10.0, 14.0) == pytest.approx(4.0)
    assert longest_silence(stamps, 10.0, 20.0) == pytest.approx(6.5)


def test_recovery_waits_for_the_last_stream() -> None:
    quick, slow = [10.1, 10.2, 10.3, 11.0], [10.05, 10.9, 11.0]
    assert recovery_s({"a": quick, "b": slow}, 10.0, 11.1) == pytest.approx(0.85)


def test_percentiles_are_values_that_occurred() -> None:
    values = [0.1 * n for n in range(1, 11)]
    assert percentile(values, 0.5) == pytest.approx(0.5)
    assert percentile(values, 0.99) == pytest.approx(1.0)
    assert percentile([], 0.99) == 0.0


@pytest.mark.parametrize(
    ("held", "copies"),
    [
        ([("a", 0, 90, (0, 1))], 1),
        ([("a", 0, 90, (0, 1)), ("b", 0, 90, (0, 1))], 2),
        ([("a", 0, 90, (0, 1)), ("a", 0, 90, (0, 1))], 1),  # Twice on one node is one copy.
        ([("a", 0, 90, (0, 1)), ("b", 0, 90, (0,)), ("c", 0, 90, (1,))], 2),
        ([("a", 0, 90, (0, 1)), ("b", 0, 90, (0,))], 1),
        ([("a", 0, 90, (0,))], 0),
        ([("a", 0, 90, (0, 1)), ("b", 0, 40, (0, 1)), ("c", 40, 90, (0, 1))], 2),
        ([("a", 0, 90, (0, 1)), ("b", 0, 40, (0, 1)), ("c", 41, 90, (0, 1))], 1),
        ([("a", 0, 89, (0, 1)), ("b", 0, 89, (0, 1))], 0),
        ([], 0),
    ],
)
def test_copies_are_counted_where_they_are_fewest(
    held: list[tuple[str, int, int, tuple[int, ...]]], copies: int
) -> None:
    shards = [
        (name, Shard("s", Span(start, stop), layers, 0, 2, (name,)))
        for name, start, stop, layers in held
    ]
    assert fewest_copies(shards, tokens=90, cells=4) == copies
