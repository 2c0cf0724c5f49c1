"""PNG files beside the reports of the prefill figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from evaluation.observations.reporting import Row, mean_over


def plot_recall(rows: Sequence[Row], path: Path) -> None:
    """Recall over the share of columns: one line per layer, dashed for another prompt's columns."""
    both = [row for row in rows if "reused_recall" in row]
    means = mean_over(both, ("layer", "share"), ("recall", "reused_recall"))
    figure, (axis, heads) = plt.subplots(1, 2, figsize=(11, 4))
    for number, layer in enumerate(sorted({row["layer"] for row in means})):
        for figure_name, style in (("recall", "o-"), ("reused_recall", "x--")):
            line = [(row["share"], row[figure_name]) for row in means if row["layer"] == layer]
            label = f"layer {layer}" if style == "o-" else None
            axis.plot(*zip(*line, strict=True), style, color=f"C{number % 10}", label=label)
    axis.set_xscale("log")
    axis.set_xlabel("share of columns (dashed: chosen in another prompt)")
    axis.set_ylabel("recall")
    axis.legend(fontsize=7)
    least = min(row["share"] for row in rows)
    per_head = mean_over(
        [row for row in rows if row["share"] == least], ("layer", "q_head"), ("recall",)
    )
    layers = sorted({row["layer"] for row in per_head})
    grid = [[row["recall"] for row in per_head if row["layer"] == layer] for layer in layers]
    shown = heads.imshow(grid, vmin=0, vmax=1, aspect="auto")
    heads.set_title(f"recall of each head, top {least:.1%} of the columns")
    heads.set_xlabel("query head")
    heads.xaxis.get_major_locator().set_params(integer=True)
    heads.set_ylabel("layer")
    heads.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    figure.colorbar(shown, ax=heads)
    _save(figure, path)


def plot_stability(rows: Sequence[Row], path: Path) -> None:
    """The pattern of each head (columns) in each prompt (rows)."""
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    heads = sorted({(row["layer"], row["q_head"]) for row in rows})
    patterns = sorted({row["pattern"] for row in rows})
    chosen = {(row["prompt"], row["layer"], row["q_head"]): row["pattern"] for row in rows}
    grid = [[patterns.index(chosen[prompt, *head]) for head in heads] for prompt in prompts]
    figure, axis = plt.subplots(figsize=(3 + 0.25 * len(heads), 1.5 + 0.35 * len(prompts)))
    colours = plt.get_cmap("viridis", max(2, len(patterns)))
    axis.imshow(grid, cmap=colours, vmin=0, vmax=max(1, len(patterns) - 1), aspect="auto")
    axis.set_yticks(range(len(prompts)), prompts, fontsize=7)
    axis.set_xticks(range(len(heads)), [f"{layer}.{head}" for layer, head in heads], fontsize=6)
    axis.set_xlabel("layer.head")
    for number, pattern in enumerate(patterns):
        axis.plot([], [], "s", color=colours(number / max(1, len(patterns) - 1)), label=pattern)
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=3)
    _save(figure, path)


def plot_comparison(rows: Sequence[Row], path: Path) -> None:
    """Recall and output error of each pattern against its attention time."""
    means = mean_over(rows, ("pattern",), ("ms", "recall", "output_error"))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, figure_name in zip(axes, ("recall", "output_error"), strict=True):
        for row in means:
            axis.plot(row["ms"], row[figure_name], "o", label=row["pattern"])
        axis.set_xlabel("ms for the measured chunks of a layer")
        axis.set_ylabel(figure_name.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    _save(figure, path)


def plot_latency(rows: Sequence[Row], path: Path) -> None:
    """Time and density of each method over prompt length."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, figure_name, label in (
        (axes[0], "seconds", "attention of one layer, s"),
        (axes[1], "density", "density"),
    ):
        for method in dict.fromkeys(row["pattern"] for row in rows):
            here = [row for row in rows if row["pattern"] == method]
            line = [(row["tokens"], row[figure_name]) for row in here]
            axis.plot(*zip(*line, strict=True), "o-", label=here[0]["method"])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("prompt tokens")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
