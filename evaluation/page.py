"""The page of results, from the JSON of one or several reports: `longreach eval --page FILE.md`.

Every figure on it stands in one of the reports, whose commands it quotes; pictures are drawn from
the same figures into a folder beside the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evaluation.page_plots import draw
from evaluation.published import DIFFERENCES, TABLES, PublishedTable
from evaluation.report import difference
from evaluation.roles import Role, role_of
from evaluation.tables import short_length, table
from longreach.errors import InvalidRequest

Row = dict[str, Any]
_WORST_TASKS = 3
_REPEAT_KEYS = ("model", "tasks", "lengths", "methods", "n", "seed", "essay", "cluster")


def write_page(reports: Sequence[Path], page: Path) -> None:
    """Writes the page and its pictures, these into a folder of the page's name.

    Raises InvalidRequest for a file that is not a report of the evaluation.
    """
    loaded = [_load(path) for path in reports]
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw(loaded, page.with_suffix(""))
    page.write_text(_page(loaded, reports, pictures, page), encoding="utf-8")


def _load(path: Path) -> Row:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"cannot read the report {path}: {error}") from error
    if not isinstance(found, dict) or found.get("benchmark") != "evaluation":
        raise InvalidRequest(f"{path} is not a report of longreach eval; pass its --json files")
    return found


def _page(
    loaded: Sequence[Row], paths: Sequence[Path], pictures: Sequence[Path], page: Path
) -> str:
    pooled = [row for report in loaded for row in report["pooled"]]
    every = [row for report in loaded for row in report["results"]]
    rows = [row for row in every if "score" in row]
    quoted = " ".join(str(path) for path in paths)
    shown = [f"![{path.stem}]({path.relative_to(page.parent)})" for path in pictures]
    parts = [
        "# Results",
        f"Written by `longreach eval --page {page} --json {quoted}` from the reports below. Scores "
        "are 0 to 100 with the number of questions in brackets; decoding is greedy; `full` is full "
        "attention over the same samples, and every difference is paired with it.",
        "## What was run",
        *(_run(report) for report in loaded),
        "## Targets",
        _targets(loaded),
        "## Accuracy over lengths",
        *_over_lengths(pooled),
        *shown,
        "## Against full attention",
        "All questions of a suite together. The interval of 95% covers resampled haystacks and "
        "Newcombe's; `better` and `worse` count questions that only one of the two answered.",
        _against_full(pooled),
        "## What loses, and by how much",
        *_losses(pooled, rows),
        "## Every task at the longest length",
        *_by_task(rows),
        *_diffuse([row for row in every if "output_error" in row]),
        "## Beside the published figures",
        *(_beside(each, pooled) for each in TABLES),
        "Why they differ:",
        "\n".join(f"- {text}" for text in DIFFERENCES),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _run(report: Row) -> str:
    config, machine = report["config"], report["machine"]
    facts = "; ".join(
        f"{name} {_plain(config[name])}" for name in _REPEAT_KEYS if config.get(name) is not None
    )
    return (
        f"- `{config['command']}`  \n"
        f"  at {report['commit']} on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['cpu_steal_share']:.0%} of the CPU time stolen by the hypervisor, "
        f"ended {config['ended']}; {facts}."
    )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _targets(loaded: Sequence[Row]) -> str:
    rows = [
        [
            each["name"],
            f"{each['target']} {each['unit']}",
            f"{each['measured']:g}",
            "yes" if each["met"] else "**no**",
            each["note"],
        ]
        for report in loaded
        for each in report["targets"]
    ]
    made = table(["target", "limit", "measured", "met", "note"], rows) if rows else ""
    skipped = [
        f"- Not decided: {each['what']} ({each['why']})."
        for report in loaded
        for each in report["skipped"]
    ]
    return "\n\n".join(part for part in (made, "\n".join(skipped)) if part)


def _over_lengths(pooled: Sequence[Row]) -> Iterable[str]:
    for suite in _in_order(row["suite"] for row in pooled):
        members = [row for row in pooled if row["suite"] == suite]
        lengths = sorted({row["length"] for row in members})
        found = {(row["method"], row["length"]): row for row in members}
        rows = [
            [method, *(_score(found.get((method, length))) for length in lengths)]
            for method in _in_order(row["method"] for row in members)
        ]
        yield f"### {suite}"
        yield table(["method", *(short_length(length) for length in lengths)], rows)


def _score(row: Row | None) -> str:
    return "" if row is None else f"{row['score']:.1f} ({row['n']})"


def _against_full(pooled: Sequence[Row]) -> str:
    head = ["method", "suite", "length", "n", "difference [95%]", "better", "worse"]
    work = ["scan", "sketch", "attended", "bytes"]
    rows = [
        [row["method"], row["suite"], short_length(row["length"]), str(row["paired_n"])]
        + [difference(row), str(row["better"]), str(row["worse"])]
        + [_share(row.get(f"{name}_fraction")) for name in work]
        for row in pooled
        if "difference" in row
    ]
    return table([*head, *work], rows) if rows else ""


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _losses(pooled: Sequence[Row], rows: Sequence[Row]) -> Iterable[str]:
    """The methods whose interval lies below zero, worst first, with the tasks they lose on."""
    lost = [row for row in pooled if row.get("difference_high", 0.0) < 0]
    if not lost:
        yield "No method lost more than its interval allows for."
        return
    yield (
        "Methods whose whole interval lies below full attention, each at the length where it "
        "loses most:"
    )
    lines = []
    for method, suite in _in_order((row["method"], row["suite"]) for row in lost):
        own = [row for row in lost if (row["method"], row["suite"]) == (method, suite)]
        worst = min(own, key=lambda row: row["difference"])
        lines.append((worst["difference"], _loss(worst, rows)))
    yield "\n".join(line for _, line in sorted(lines))


def _loss(worst: Row, rows: Sequence[Row]) -> str:
    tasks = [
        row
        for row in rows
        if (row["method"], row["suite"], row["length"])
        == (worst["method"], worst["suite"], worst["length"])
        and row.get("difference", 0.0) < 0
    ]
    named = ", ".join(
        f"{row['task']} {row['difference']:+.1f}"
        for row in sorted(tasks, key=lambda row: row["difference"])[:_WORST_TASKS]
    )
    role = role_of(worst["method"])
    ours = role in (Role.DEFAULT, Role.SEARCHES)
    return (
        f"- {'**' if ours else ''}{worst['method']}{'**' if ours else ''} ({role.value}), "
        f"{worst['suite']} at {short_length(worst['length'])}: {difference(worst)} of full "
        f"attention's {worst['score'] - worst['difference']:.1f}, n {worst['paired_n']}"
        + (f"; most on {named}" if named else "")
        + "."
    )


def _by_task(rows: Sequence[Row]) -> Iterable[str]:
    for suite in _in_order(row["suite"] for row in rows):
        members = [row for row in rows if row["suite"] == suite]
        longest = max(row["length"] for row in members)
        members = [row for row in members if row["length"] == longest]
        tasks = _in_order(row["task"] for row in members)
        found = {(row["method"], row["task"]): row for row in members}
        made = [
            [method, *(_score(found.get((method, task))) for task in tasks)]
            for method in _in_order(row["method"] for row in members)
        ]
        yield f"### {suite}, {short_length(longest)}"
        yield table(["method", *(task.partition("/")[2] or task for task in tasks)], made)


def _diffuse(rows: Sequence[Row]) -> Iterable[str]:
    """The synthetic head whose mass a hundred keys do not carry."""
    if not rows:
        return
    yield "## A diffuse head"
    yield (
        "The demo model's attention is sharp: an answer hangs on a few keys. This synthetic head "
        "spreads its mass, as heads of large models do; methods attend it through the code that "
        "runs on models, with at least as many keys of a KV head as the default reads. The error "
        "is the median of the output's relative one."
    )
    head = ["method", "keys", "output error", "keys read", "scan", "sketch", "attended", "bytes"]
    shares = ("scan", "sketch", "attended", "bytes")
    yield table(
        head,
        [
            [
                row["method"],
                short_length(row["length"]),
                f"{row['output_error']:.4f}",
                f"{row['keys_read']:g}",
                *(_share(row[f"{name}_fraction"]) for name in shares),
            ]
            for row in sorted(rows, key=lambda row: row["output_error"])
        ],
    )


def _beside(published: PublishedTable, pooled: Sequence[Row]) -> str:
    """A published table with our row of the same method and suite, where there is one."""
    rows = []
    for name, score, ours in published.rows:
        same = [row for row in pooled if published.beside(ours, row["method"])]
        suite = [row for row in same if row["suite"] == published.suite]
        suite = suite or [row for row in same if row["suite"] == "mixed_haystack"]
        wanted = published.length_tokens or max((row["length"] for row in suite), default=0)
        shown = [row for row in suite if row["length"] == wanted]
        cell = "; ".join(
            f"{_score(row)}, {row['method']} on {row['suite']} at {short_length(row['length'])}"
            for row in shown
        )
        rows.append([name, f"{score:.1f}", cell or "not run"])
    return (
        f"**{published.title}** ({published.source})\n\n"
        f"{table(['method', 'published', 'ours'], rows)}"
    )


def _in_order(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
