"""PNG files beside a report: the needle heatmap of each method, and score over length."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap

from evaluation.report import cells
from evaluation.results import Record
from evaluation.tables import short_length

_RED_TO_GREEN = LinearSegmentedColormap.from_list("needle", ["#F0496E", "#EBB839", "#0CD79F"])

Grid = dict[tuple[float, int], float]
"""Mean score, 0 to 100, by depth and length."""


def write_plots(records: Sequence[Record], stem: Path) -> list[Path]:
    """Writes what the records allow: STEM.needle.METHOD.png and .csv, STEM.SUITE.png."""
    written = []
    for method in dict.fromkeys(r.method for r in records if r.task == "needle"):
        grid = needle_grid([r for r in records if (r.method, r.task) == (method, "needle")])
        base = f"{stem.name}.needle.{method_slug(method)}"
        written.append(_write_csv(grid, stem.with_name(base + ".csv")))
        written.append(heatmap(grid, method, stem.with_name(base + ".png")))
    for suite in dict.fromkeys(record.suite for record in records):
        members = [record for record in records if record.suite == suite]
        if len({record.length for record in members}) > 1:
            written.append(_curves(members, suite, stem.with_name(f"{stem.name}.{suite}.png")))
    return written


def needle_grids(records: Sequence[Record]) -> dict[str, list[list[float]]]:
    """Rows (depth, length, score) of the needle test by method, as a report's JSON keeps them."""
    needles = [record for record in records if record.task == "needle"]
    return {
        method: [
            [depth, length, round(score, 2)]
            for (depth, length), score in needle_grid(
                [record for record in needles if record.method == method]
            ).items()
        ]
        for method in dict.fromkeys(record.method for record in needles)
    }


def needle_grid(records: Sequence[Record]) -> Grid:
    """Mean score of each (depth, length)."""
    scores: dict[tuple[float, int], list[float]] = defaultdict(list)
    for record in records:
        scores[float(record.metadata["depth"]), record.length].append(record.score)
    return {key: 100 * sum(found) / len(found) for key, found in sorted(scores.items())}


def _write_csv(grid: Grid, path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["depth", "length", "score"])
        writer.writerows(
            [f"{depth:.4f}", length, f"{s:.2f}"] for (depth, length), s in grid.items()
        )
    return path


def method_slug(method: str) -> str:
    """A method's name as a part of file names."""
    return re.sub(r"[^A-Za-z0-9]+", "-", method).strip("-")


def heatmap(grid: Grid, method: str, path: Path) -> Path:
    """Draws score over length and depth as needle tests are shown."""
    depths = sorted({depth for depth, _ in grid})
    lengths = sorted({length for _, length in grid})
    image = [[grid.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    figure, axes = plt.subplots(figsize=(2.5 + 0.6 * len(lengths), 1.5 + 0.35 * len(depths)))
    shown = axes.imshow(image, cmap=_RED_TO_GREEN, vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"Needle in a haystack, {method}")
    figure.colorbar(shown, ax=axes, label="score")
    return save(figure, path)


def _curves(records: Sequence[Record], suite: str, path: Path) -> Path:
    """Score over length, the mean over tasks; one line per method."""
    found = cells(records)
    lengths = sorted({cell.length for cell in found})
    figure, axes = plt.subplots(figsize=(6, 4))
    for method in dict.fromkeys(cell.method for cell in found):
        points = []
        for length in lengths:
            scores = [c.score for c in found if (c.method, c.length) == (method, length)]
            points.append(sum(scores) / len(scores) if scores else float("nan"))
        axes.plot(range(len(lengths)), points, marker="o", label=method)
    axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("score")
    axes.set_ylim(-2, 102)
    axes.set_title(suite)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    return save(figure, path)


def save(figure: plt.Figure, path: Path) -> Path:
    """Writes a figure and frees it."""
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
