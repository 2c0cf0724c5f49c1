"""A report as Markdown tables in the papers' layout: methods down, tasks or lengths across."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.report import Report
from evaluation.report import Cell, cells, difference
from evaluation.results import Record

RULER_THRESHOLD = 85.6
"""What Llama-2-7B scores at 4K; RULER calls a length effective where a model reaches it."""


def markdown(report: Report, records: Sequence[Record]) -> str:
    """The tables: per suite, methods over lengths, then methods over tasks at each length."""
    parts = ["# Accuracy over long contexts", _conditions(report)]
    found = cells(records)
    suite_of = {record.column: record.suite for record in records}
    for suite in dict.fromkeys(suite_of.values()):
        members = [cell for cell in found if suite_of[cell.task] == suite]
        parts.append(f"## {suite}")
        parts.append(_over_lengths(members))
        if suite == "ruler":
            parts.append(_effective_lengths(members))
        for length in sorted({cell.length for cell in members}):
            parts.append(f"### {length} tokens")
            parts.append(_over_tasks([cell for cell in members if cell.length == length]))
    parts.append("## Against full attention, on the same questions")
    parts.append(_against_full(report))
    return "\n\n".join(part for part in parts if part) + "\n"


def _conditions(report: Report) -> str:
    facts = {**report.config, "machine": report.as_json()["machine"]["cpu"]}
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    note = "Scores are 0 to 100, with the number of questions in brackets; decoding is greedy."
    return "\n".join([note, "", *lines])


def _over_lengths(members: Sequence[Cell]) -> str:
    lengths = sorted({cell.length for cell in members})
    tasks = {cell.task for cell in members}
    rows = []
    for method in dict.fromkeys(cell.method for cell in members):
        own = [cell for cell in members if cell.method == method]
        at_length = [[cell for cell in own if cell.length == length] for length in lengths]
        rows.append([method, *(_average(found, tasks) for found in at_length)])
    return table(["average over tasks", *(short_length(n) for n in lengths)], rows)


def _effective_lengths(members: Sequence[Cell]) -> str:
    """RULER's effective length of each method: the longest that, like all shorter, scores enough.

    RULER compares averages over its 13 tasks; here it is over those that were run.
    """
    lines = []
    for method in dict.fromkeys(cell.method for cell in members):
        scores: dict[int, list[float]] = {}
        for cell in members:
            if cell.method == method:
                scores.setdefault(cell.length, []).append(cell.score)
        effective = "none"
        for length, found in sorted(scores.items()):
            if sum(found) / len(found) < RULER_THRESHOLD:
                break
            effective = short_length(length)
        lines.append(f"{method}: {effective}")
    return f"Effective length (average at least {RULER_THRESHOLD}): " + "; ".join(lines) + "."


def _over_tasks(members: Sequence[Cell]) -> str:
    tasks = list(dict.fromkeys(cell.task for cell in members))
    by_key = {(cell.method, cell.task): cell for cell in members}
    rows = []
    for method in dict.fromkeys(cell.method for cell in members):
        own = [by_key[method, task] for task in tasks if (method, task) in by_key]
        shown = [_shown(by_key.get((method, task))) for task in tasks]
        rows.append([method, *shown, _average(own, set(tasks))])
    return table(["method", *tasks, "average"], rows)


def _average(own: Sequence[Cell], tasks: set[str]) -> str:
    """Mean over tasks; empty where a task is missing, because it would not compare."""
    if {cell.task for cell in own} != tasks:
        return ""
    n = sum(len(cell.records) for cell in own)
    return f"{sum(cell.score for cell in own) / len(own):.1f} ({n})"


def _shown(cell: Cell | None) -> str:
    return "" if cell is None else f"{cell.score:.1f} ({len(cell.records)})"


def _against_full(report: Report) -> str:
    columns = ["better", "worse", "mcnemar_p"]
    work = ["scan_fraction", "sketch_fraction", "attended_fraction", "bytes_fraction"]
    rows = []
    for row in report.results:
        if "difference" not in row:
            continue
        rows.append(
            [row["method"], row["task"], str(row["length"]), str(row["paired_n"]), difference(row)]
            + [str(row[name]) for name in columns]
            + [f"{row[name]:.2%}" if name in row else "" for name in work]
        )
    head = ["method", "task", "length", "n", "difference [95%]", "better", "worse", "McNemar p"]
    return table([*head, "scan", "sketch", "attended", "bytes"], rows) if rows else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def short_length(tokens: int) -> str:
    """4096 as "4K"; other numbers as they are."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
