"""A method's answers beside full attention's to the same questions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from evaluation.methods import FULL
from evaluation.results import Record
from evaluation.statistics import Comparison, compare

FullAnswers = Mapping[tuple[Any, ...], Record]
"""Full attention's answers by what is asked: the key without the method."""


def full_answers(records: Iterable[Record]) -> FullAnswers:
    """Those of the records that are full attention's."""
    return {record.key[1:]: record for record in records if record.method == FULL}


def pair_with_full(records: Iterable[Record], full: FullAnswers) -> Comparison | None:
    """The comparison over what both answered; None where that is nothing.

    Questions over one haystack are resampled together.
    """
    pairs = [(record, full[record.key[1:]]) for record in records if record.key[1:] in full]
    if not pairs:
        return None
    return compare(
        [own.score for own, _ in pairs],
        [reference.score for _, reference in pairs],
        [(own.task, own.length, own.haystack) for own, _ in pairs],
    )
