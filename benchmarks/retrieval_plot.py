"""Plot of the retrieval benchmark: time against recall, one panel for each data set and size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the plot of a report's results."""
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
            ours = any(row["attends"] for row in here if row["method"] == method)
            axis.plot(*zip(*points, strict=True), "o-" if ours else "x--", label=method)
        axis.set_title(f"{data}, {keys // 1024}K keys")
        axis.set_xlabel("recall of the best 100 keys")
        axis.set_ylabel("ms, cold (solid: with attention)")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
