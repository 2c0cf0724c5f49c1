"""From answers to figures: a row per method, task and length, beside full attention."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import Report
from evaluation.methods import FULL
from evaluation.pairing import FullAnswers, full_answers, pair_with_full
from evaluation.results import Record
from evaluation.statistics import wilson
from evaluation.targets import add_targets, add_time_target
from longreach.types import WorkFigures


@dataclass(frozen=True)
class Cell:
    """Answers of one method to one task, or one kind of a mixed task, at one length."""

    method: str
    task: str
    length: int
    records: tuple[Record, ...]

    @property
    def score(self) -> float:
        """Mean score, 0 to 100."""
        return 100 * sum(record.score for record in self.records) / len(self.records)


def cells(records: Iterable[Record]) -> list[Cell]:
    """Records by method, task and length, the methods in order of appearance."""
    found: dict[tuple[str, str, int], list[Record]] = defaultdict(list)
    for record in records:
        found[record.method, record.column, record.length].append(record)
    methods = list(dict.fromkeys(method for method, _, _ in found))
    ordered = sorted(found.items(), key=lambda item: methods.index(item[0][0]))
    return [Cell(*key, tuple(members)) for key, members in ordered]


def fill_report(report: Report, records: Sequence[Record], elapsed_s: float | None = None) -> None:
    """Adds a row per cell, and the targets; `elapsed_s` is what all answers together took."""
    full = full_answers(records)
    for cell in cells(records):
        report.add(**_row(cell, full))
    add_targets(report, records)
    if elapsed_s is not None:
        add_time_target(report, elapsed_s)


def pooled_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row per method, suite and length, over all questions of the suite together."""
    full = full_answers(records)
    found: dict[tuple[str, str, int], list[Record]] = defaultdict(list)
    for record in records:
        found[record.method, record.suite, record.length].append(record)
    return [
        {"method": method, "suite": suite, "length": length, **_figures(tuple(members), full)}
        for (method, suite, length), members in found.items()
    ]


def _row(cell: Cell, full: FullAnswers) -> dict[str, Any]:
    named = {
        "method": cell.method,
        "suite": cell.records[0].suite,
        "task": cell.task,
        "length": cell.length,
    }
    return named | _figures(cell.records, full)


def _figures(records: Sequence[Record], full: FullAnswers) -> dict[str, Any]:
    """Score, difference from full attention with its interval, and cost."""
    n = len(records)
    score = sum(record.score for record in records) / n
    sure = wilson(score, n)
    row: dict[str, Any] = {
        "n": n,
        "haystacks": len({(record.task, record.haystack) for record in records}),
        "score": round(100 * score, 2),
        "score_low": round(100 * sure.low, 2),
        "score_high": round(100 * sure.high, 2),
    }
    paired = None if records[0].method == FULL else pair_with_full(records, full)
    if paired is not None:
        row |= {
            "difference": round(100 * paired.difference, 2),
            "difference_low": round(100 * paired.interval.low, 2),
            "difference_high": round(100 * paired.interval.high, 2),
            "better": paired.better,
            "worse": paired.worse,
            "mcnemar_p": round(paired.p_value, 5),
            "paired_n": paired.n,
        }
    return row | _cost(records)


def _cost(records: Sequence[Record]) -> dict[str, Any]:
    """The four work figures over all answers, always together, and what the worker held."""
    works = [record.work for record in records if record.work is not None]
    cost: dict[str, Any] = {
        "seconds_per_answer": round(sum(r.seconds for r in records) / len(records), 3)
    }
    if works:
        work = sum(works, WorkFigures())
        cost |= {
            "scan_fraction": round(work.scan_fraction, 5),
            "sketch_fraction": round(work.sketch_fraction, 5),
            "attended_fraction": round(work.attended_fraction, 5),
            "bytes_fraction": round(work.bytes_fraction, 5),
            "resident_share": round(sum(r.resident_share for r in records) / len(records), 5),
            "index_kinds": sorted({kind for record in records for kind in record.index_kinds}),
        }
    densities = [r.prefill_density for r in records if r.prefill_density is not None]
    if densities:
        cost["prefill_density"] = round(sum(densities) / len(densities), 5)
    return cost


def summary(report: Report) -> Report:
    """The report with rows short enough for a terminal."""
    rows = [
        {
            "method": row["method"],
            "task": row["task"],
            "length": row["length"],
            "n": row["n"],
            "score": row["score"],
            "difference [95%]": difference(row),
            "attended": f"{row['attended_fraction']:.2%}" if "attended_fraction" in row else "",
        }
        for row in report.results
        if "score" in row
    ]
    return dataclasses.replace(report, results=rows)


def difference(row: Mapping[str, Any]) -> str:
    """A row's difference from full attention with its interval; empty for full attention."""
    if "difference" not in row:
        return ""
    low, high = row["difference_low"], row["difference_high"]
    return f"{row['difference']:+.1f} [{low:.1f}, {high:.1f}]"
