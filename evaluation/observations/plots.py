"""PNG files beside the reports of the observations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from evaluation.observations.dynamics import RULES
from evaluation.observations.mahalanobis import Distances
from evaluation.observations.reporting import Row, mean_over


def plot_sparsity(rows: Sequence[Row], path: Path) -> None:
    """Mass and relative error over k: a thin line for each head, a thick one for a layer's mean."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, figure_name in zip(axes, ("mass", "relative_error"), strict=True):
        means = mean_over(rows, ("layer", "k"), (figure_name,))
        for number, layer in enumerate(sorted({row["layer"] for row in rows})):
            here = [row for row in rows if row["layer"] == layer]
            colour = f"C{number % 10}"
            for head in sorted({row["q_head"] for row in here}):
                line = [(row["k"], row[figure_name]) for row in here if row["q_head"] == head]
                axis.plot(*zip(*line, strict=True), color=colour, alpha=0.25, linewidth=0.8)
            line = [(row["k"], row[figure_name]) for row in means if row["layer"] == layer]
            axis.plot(*zip(*line, strict=True), "o-", color=colour, label=f"layer {layer}")
        axis.set_xscale("log")
        axis.set_xlabel("keys kept of " + _sizes(rows))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of attention mass")
    axes[0].set_ylim(0, 1.02)
    axes[1].set_ylabel("relative error of the output (median)")
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=7)
    _save(figure, path)


def plot_dynamics(steps: Sequence[Row], path: Path) -> None:
    """Mass that each rule's keys hold, step by step, for the largest k; and its mean over k."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    most = max(row["k"] for row in steps)
    over_steps = mean_over([row for row in steps if row["k"] == most], ("rule", "step"), ("mass",))
    over_k = mean_over(steps, ("rule", "k"), ("mass", "set_recall"))
    for rule in RULES:
        line = [(row["step"], row["mass"]) for row in over_steps if row["rule"] == rule]
        axes[0].plot(*zip(*line, strict=True), label=rule)
        line = [(row["k"], row["mass"]) for row in over_k if row["rule"] == rule]
        (drawn,) = axes[1].plot(*zip(*line, strict=True), "o-", label=f"{rule}: mass")
        line = [(row["k"], row["set_recall"]) for row in over_k if row["rule"] == rule]
        axes[1].plot(
            *zip(*line, strict=True), "x--", color=drawn.get_color(), label=f"{rule}: set recall"
        )
    axes[0].set_title(f"best {most} of {_sizes(steps)} keys, mean over heads")
    axes[0].set_xlabel("decode step")
    axes[0].set_ylabel("share of attention mass")
    axes[1].set_xscale("log")
    axes[1].set_xlabel("keys kept")
    for axis in axes:
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, framealpha=0.6)
    _save(figure, path)


def plot_searches(rows: Sequence[Row], path: Path) -> None:
    """Recall over the share of keys read: solid by queries, dashed by keys; a panel for a head."""
    panels = sorted({(row["layer"], row["kv_head"]) for row in rows})
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 4 * lines), squeeze=False)
    for axis in axes.reshape(-1)[len(panels) :]:
        axis.set_visible(False)
    for axis, (layer, head) in zip(axes.reshape(-1), panels, strict=False):
        here = [row for row in rows if (row["layer"], row["kv_head"]) == (layer, head)]
        for number, index in enumerate(dict.fromkeys(row["index"] for row in here)):
            for search, style in (("Q→K", "o-"), ("K→K", "x--")):
                line = [
                    (100 * row["scan_fraction"], row["recall"])
                    for row in here
                    if (row["index"], row["search"]) == (index, search)
                ]
                label = f"{index} {search}"
                axis.plot(*zip(*line, strict=True), style, color=f"C{number}", label=label)
        axis.axhline(0.95, color="grey", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel(f"% of {_sizes(here)} keys read")
        axis.set_ylabel("recall")
        axis.set_title(f"layer {layer}, KV head {head}")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    _save(figure, path)


def plot_distances(measured: Sequence[tuple[Row, Distances]], path: Path) -> None:
    """Histograms of the Mahalanobis distances of keys and of queries, all heads together."""
    figure, axis = plt.subplots(figsize=(6, 4))
    keys = np.concatenate([found.keys for _, found in measured])
    queries = np.concatenate([found.queries for _, found in measured])
    low, high = min(keys.min(), queries.min()), max(keys.max(), queries.max())
    bins = np.geomspace(max(low, 1e-3), max(high, 2e-3), 60)
    for distances, label in ((keys, "keys to keys"), (queries, "queries to keys")):
        weights = np.full(len(distances), 1 / len(distances))
        axis.hist(distances, bins=bins, weights=weights, alpha=0.6, label=label)
    axis.set_xscale("log")
    axis.set_xlabel("Mahalanobis distance to the keys' distribution")
    axis.set_ylabel("share")
    axis.legend()
    _save(figure, path)


def _sizes(rows: Sequence[Row]) -> str:
    """How many keys there are, as text; heads of one source have equally many."""
    return f"{max(row['keys'] for row in rows):,}"


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
