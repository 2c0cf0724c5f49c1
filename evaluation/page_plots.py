"""Pictures of the page of results, from the rows of reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from evaluation.plots import Grid, heatmap, method_slug, save
from evaluation.roles import Role, role_of
from evaluation.tables import short_length

_MARKS = {
    Role.FULL: ("k", "s"),
    Role.DEFAULT: ("#0CA678", "*"),
    Role.SEARCHES: ("#1C7ED6", "o"),
    Role.BASELINE: ("#F08C00", "^"),
    Role.DROPS_KEYS: ("#E03131", "v"),
}


def draw(reports: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws what the reports allow into `folder`: curves, budgets, heatmaps; gives the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pooled = [row for report in reports for row in report["pooled"]]
    written = []
    for suite in dict.fromkeys(row["suite"] for row in pooled):
        members = [row for row in pooled if row["suite"] == suite]
        if len({row["length"] for row in members}) > 1:
            written.append(_curves(members, suite, folder / f"{suite}.png"))
        longest = max(row["length"] for row in members)
        priced = [row for row in members if row["length"] == longest and "attended_fraction" in row]
        if len(priced) > 1:
            path = folder / f"{suite}-budgets.png"
            written.append(_budgets(members, priced, f"{suite}, {short_length(longest)}", path))
    for report in reports:
        for method, rows in report["needle"].items():
            grid: Grid = {(depth, int(length)): score for depth, length, score in rows}
            written.append(heatmap(grid, method, folder / f"needle-{method_slug(method)}.png"))
    return written


def _curves(rows: Sequence[dict[str, Any]], suite: str, path: Path) -> Path:
    """Score over length with its interval, one line per method."""
    lengths = sorted({row["length"] for row in rows})
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["length"]: row for row in rows if row["method"] == method}
        colour, mark = _MARKS[role_of(method)]
        nan = float("nan")
        scores = [own[length]["score"] if length in own else nan for length in lengths]
        strong = role_of(method) in (Role.FULL, Role.DEFAULT)
        axes.plot(
            range(len(lengths)), scores, marker=mark, color=colour if strong else None,
            linewidth=2.5 if strong else 1.0, label=method,
        )  # fmt: skip
    axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("score")
    axes.set_ylim(-2, 102)
    axes.set_title(suite)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return save(figure, path)


def _budgets(
    rows: Sequence[dict[str, Any]], priced: Sequence[dict[str, Any]], title: str, path: Path
) -> Path:
    """Keys attended against score at one length, one point per method."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for row in priced:
        colour, mark = _MARKS[role_of(row["method"])]
        share = 100 * max(row["attended_fraction"], 1e-6)
        low, high = row["score"] - row["score_low"], row["score_high"] - row["score"]
        axes.errorbar(
            share, row["score"], [[max(0.0, low)], [max(0.0, high)]], fmt=mark, color=colour
        )
        axes.annotate(
            row["method"], (share, row["score"]), (4, 4), textcoords="offset points", fontsize=7
        )
    length = priced[0]["length"]
    for row in rows:
        if role_of(row["method"]) is Role.FULL and row["length"] == length:
            axes.axhline(row["score"], color="k", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("keys attended, % of those in scope")
    axes.set_ylabel("score")
    axes.set_ylim(-2, 105)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return save(figure, path)
