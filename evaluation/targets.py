"""What the methods are held to, as rows of a report's `targets`.

* The default decode over the default prefill loses next to nothing at 32K and above: net at most
  one answer in 200, with at most 3% of the keys attended exactly.
* Any other method that searches an index loses at most what RetrievalAttention was published to.
* Methods that drop keys for good (a fixed window, keys chosen before the question is known) keep at
  most half of full attention's score where an answer hangs on single keys. RULER 4K-128K,
  Llama-3-8B-262K: StreamingLLM 35.0 of 84.4 (arXiv 2407.02490).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from benchmarks.report import Report
from evaluation.methods import FULL
from evaluation.pairing import FullAnswers, full_answers, pair_with_full
from evaluation.results import Record
from evaluation.roles import Role, role_of
from evaluation.statistics import Comparison
from longreach.types import WorkFigures

PUBLISHED_LOSS = {"ruler": 4.0, "infinitebench": 1.5}
"""Points RetrievalAttention (top-100) loses against full attention on Llama-3-8B-262K: RULER 128K
74.7 of 78.7, InfiniteBench 48.9 of 50.4 (arXiv 2409.10516)."""

_OTHER_LOSS = 4.0
_QUESTIONS_MIN = 20
"""With fewer, nothing is claimed. Targets are set on all tasks of a suite together."""

LONG_TOKENS = 32_768
PER = 200
NET_LOSS_MAX = 1.0
ATTENDED_MAX = 0.03
KEPT_SHARE_MAX = 0.5
REPORT_S_MAX = 3 * 3600.0

_SINGLE_KEY = ("kv", "kv_uuid", "number", "uuid")
"""Kinds of questions whose answer hangs on single keys anywhere in the haystack."""


def add_targets(report: Report, records: Sequence[Record]) -> None:
    """Adds a row for each claim that the records can decide, and says why others are left out."""
    full = full_answers(records)
    by_method: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.method != FULL:
            by_method[record.method].append(record)
    for method, members in by_method.items():
        role = role_of(method)
        if role is Role.DEFAULT:
            _near_lossless(report, method, members, full)
        if role is Role.DROPS_KEYS:
            _keeps_little(report, method, members, full)
        elif role is not Role.BASELINE:
            _published_loss(report, method, members, full)


def add_time_target(report: Report, elapsed_s: float) -> None:
    """The whole report's time, all runs that filled its results file together."""
    report.at_most("time of the whole report", REPORT_S_MAX, round(elapsed_s, 1), "s")


def _near_lossless(
    report: Report, method: str, members: Sequence[Record], full: FullAnswers
) -> None:
    for length in sorted({r.length for r in members if r.length >= LONG_TOKENS}):
        at_length = [record for record in members if record.length == length]
        name = f"{method}, {length // 1024}K: answers lost of {PER}, net, against full attention"
        paired = pair_with_full(at_length, full)
        if paired is None or paired.n < PER:
            report.skip(name, f"{paired.n if paired else 0} paired questions; {PER} are needed")
            continue
        lost = PER * (paired.worse - paired.better) / paired.n
        report.at_most(name, NET_LOSS_MAX, round(lost, 3), "answers", _note(paired))
        work = sum((r.work for r in at_length if r.work is not None), WorkFigures())
        report.at_most(
            f"{method}, {length // 1024}K: keys attended exactly",
            ATTENDED_MAX,
            round(work.attended_fraction, 5),
            "of those in scope",
            f"scan {work.scan_fraction:.2%}, sketch {work.sketch_fraction:.2%}, "
            f"bytes {work.bytes_fraction:.2%}",
        )


def _keeps_little(
    report: Report, method: str, members: Sequence[Record], full: FullAnswers
) -> None:
    asked = [
        record
        for record in members
        if record.length >= LONG_TOKENS and record.metadata.get("kind") in _SINGLE_KEY
    ]
    name = f"{method} fails where an answer hangs on single keys: share of full's score it keeps"
    paired = pair_with_full(asked, full)
    if paired is None or paired.n < _QUESTIONS_MIN or paired.full_mean == 0:
        report.skip(name, f"too few such questions at {LONG_TOKENS} tokens and above")
        return
    share = round(paired.mean / paired.full_mean, 4)
    report.at_most(name, KEPT_SHARE_MAX, share, "share", _note(paired))


def _published_loss(
    report: Report, method: str, members: Sequence[Record], full: FullAnswers
) -> None:
    for suite in dict.fromkeys(record.suite for record in members):
        name = f"loss of {method} against full attention, {suite}"
        paired = pair_with_full([r for r in members if r.suite == suite], full)
        if paired is None:
            report.skip(name, "full attention answered none of the same questions")
        elif paired.full_mean == 0:
            why = f"full attention scores 0 on all {paired.n} questions: nothing to lose"
            report.skip(name, why)
        elif paired.n < _QUESTIONS_MIN:
            why = f"{paired.n} questions are too few to tell; {_QUESTIONS_MIN} are needed"
            report.skip(name, why)
        else:
            note = _note(paired)
            if suite in PUBLISHED_LOSS:
                note += "; the limit is RetrievalAttention's published loss"
            loss = round(100 * (paired.full_mean - paired.mean), 2)
            report.at_most(name, PUBLISHED_LOSS.get(suite, _OTHER_LOSS), loss, "points", note)


def _note(paired: Comparison) -> str:
    low, high = 100 * paired.interval.low, 100 * paired.interval.high
    return (
        f"full attention {100 * paired.full_mean:.1f}, n {paired.n}, {paired.worse} worse and "
        f"{paired.better} better, difference in [{low:.1f}, {high:.1f}] with 95% confidence"
    )
