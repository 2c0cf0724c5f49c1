"""What every observation prints and writes: NAME.json, NAME.csv and, beside them, its plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from benchmarks.report import Report, print_report

Row = dict[str, Any]


def progress_bar() -> Progress:
    """A progress bar on stderr, so that stdout stays the report."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def finish(report: Report, out: Path, summary: Mapping[str, Sequence[Row]], note: str = "") -> None:
    """Writes the report's rows as JSON and CSV, and prints the summary, the targets and the note.

    `summary` maps titles to tables. The JSON is a benchmark's (benchmarks/report.py) with `summary`
    and `note` beside the rows.
    """
    out.mkdir(parents=True, exist_ok=True)
    name = report.benchmark
    tables = {title: list(rows) for title, rows in summary.items()}
    content = report.as_json() | {"summary": tables, "note": note}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_csv(report.results, out / f"{name}.csv")
    for title, rows in tables.items():
        print_report(Report(title, report.config, results=rows))
    print_report(Report(name, report.config, targets=report.targets, skipped=report.skipped))
    if note:
        Console().print(note, markup=False)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows with the union of their columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def mean_over(rows: Sequence[Row], by: Sequence[str], figures: Sequence[str]) -> list[Row]:
    """One row for each combination of `by`, in order of appearance, with the means of `figures`."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return [
        dict(zip(by, key, strict=True))
        | {name: float(np.mean([row[name] for row in members])) for name in figures}
        for key, members in groups.items()
    ]
