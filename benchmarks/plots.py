"""Pictures of benchmark reports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Report = dict[str, Any]


def _series(rows: list[dict[str, Any]], x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        series[row["method"]].append((row[x], row[y]))
    return series


def decode(report: Report, path: Path) -> None:
    """Time per token and resident KV against context length."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for axis, column, label, factor in (
        (axes[0], "token_ms", "ms per token", 1.0),
        (axes[1], "resident_kv_bytes", "resident KV, MiB", 2.0**-20),
    ):
        for method, points in _series(report["results"], "context_tokens", column).items():
            axis.plot(*zip(*[(x, y * factor) for x, y in points], strict=True), "o-", label=method)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("context tokens")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(
        f"One decode step, {report['config']['layers']} layers, {report['config']['budget']}"
    )
    _save(figure, path)


def prefill(report: Report, path: Path) -> None:
    """Attention time of a whole prefill against prompt length, a panel for each shape."""
    shapes = list(dict.fromkeys(row["shape"] for row in report["results"]))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 4.2), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        rows = [row for row in report["results"] if row["shape"] == shape]
        for method, points in _series(rows, "tokens", "total_s").items():
            axis.plot(*zip(*points, strict=True), "o-", label=method)
        axis.set_title(shape)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("prompt tokens")
        axis.set_ylabel("attention of one layer, s")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


PLOTS: dict[str, Callable[[Report, Path], None]] = {"decode": decode, "prefill": prefill}
"""The picture of each benchmark that has one here; others draw their own."""
