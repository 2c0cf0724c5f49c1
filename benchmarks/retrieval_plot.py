"""Plots of the retrieval benchmark.

Time against recall, one panel for each data set and size; and time against the number of keys at
one recall, one panel for each data set, which is what `auto` goes by.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.retrieval_targets import GROWTH_RECALL, fastest
from retrieval_node.index.auto import EXACT_BELOW


def line_styles(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How each method is drawn, the same in every panel: ours solid, with attention."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    ours = {row["method"] for row in rows if row["attends"]}
    colours = pyplot.get_cmap("tab20")
    return {
        method: {
            "color": colours(number),
            "linestyle": "-" if method in ours else "--",
            "marker": "o" if method in ours else "x",
            "label": method,
        }
        for number, method in enumerate(methods)
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the plot of a report's results."""
    styles = line_styles(rows)
    panels = sorted({(row["data"], row["keys"]) for row in rows}, reverse=True)
    columns = min(4, max(1, len(panels)))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 4 * lines), squeeze=False, sharey=True
    )
    for axis in axes.reshape(-1)[len(panels) :]:
        axis.set_visible(False)
    for axis, (data, keys) in zip(axes.reshape(-1), panels, strict=False):
        here = [
            row
            for row in rows
            if (row["data"], row["keys"]) == (data, keys) and "tail" not in row["setting"]
        ]
        for method in sorted({row["method"] for row in here}):
            points = sorted((r["recall"], r["cold_ms"]) for r in here if r["method"] == method)
            axis.plot(*zip(*points, strict=True), **styles[method])
        axis.set_title(f"{data}, {keys // 1024}K keys")
        axis.set_xlabel("recall of the best 100 keys")
        axis.set_ylabel("ms, cold (solid: with attention)")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_growth(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the plot of time against keys; nothing when one size was measured."""
    if len({row["keys"] for row in rows}) < 2:
        return
    styles = line_styles(rows)
    data_sets = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(data_sets), figsize=(6 * len(data_sets), 4.5), squeeze=False, sharey=True
    )
    for axis, data in zip(axes[0], data_sets, strict=True):
        here = [row for row in rows if row["data"] == data]
        for method in dict.fromkeys(row["method"] for row in here):
            points = []
            for keys in sorted({row["keys"] for row in here}):
                row = fastest([row for row in here if row["keys"] == keys], method, GROWTH_RECALL)
                if row is not None:
                    points.append((keys, row["cold_ms"]))
            if points:
                axis.plot(*zip(*points, strict=True), **styles[method])
        axis.axvline(EXACT_BELOW, color="gray", linestyle=":")
        axis.set_title(f"{data}; auto: flat left of the dotted line, sketch right of it")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("keys")
        axis.set_ylabel(f"ms at recall {GROWTH_RECALL}, cold (solid: with attention)")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
