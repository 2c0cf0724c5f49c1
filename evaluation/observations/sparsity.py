"""`sparsity`: how much of attention the top-k keys of each query hold.

For every decode query and k: the share of attention mass on its k keys of highest logit, and how
far attention over those keys alone is from attention over all: ||o_k - o|| / ||o|| and the mean of
(o_k - o)^2 over the output's components. The context is what comes before the decode queries.
MInference (arXiv 2407.02490, section 2) measures mass in prefill; the error is what a fixed top-k
budget costs even where the search is exact.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.report import Report
from evaluation.observations.heads import HeadGroup, add_source_flags, source_of
from evaluation.observations.reporting import Row, finish, mean_over, progress_bar
from longreach.attention import attention_logits
from longreach.types import FloatArray, StorageArray

TOP_K = (1, 4, 16, 32, 64, 100, 128, 256, 512, 1024, 2048, 4096)
FIGURES = ("mass", "relative_error", "mean_square_error")


@dataclass(frozen=True, slots=True)
class TopKAttention:
    """Attention of q queries over their k best keys, for each of several k.

    mass [q, ks]: share of attention on them; outputs [q, ks, value_dim]: attention over them
    alone; full [q, value_dim]: attention over all keys.
    """

    mass: FloatArray
    outputs: FloatArray
    full: FloatArray


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("sparsity", help="attention mass and output error of top-k keys")
    parser.description = __doc__
    add_source_flags(parser, n=32_768)
    parser.add_argument("--k", type=int, nargs="+", default=TOP_K, help="numbers of keys kept")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Measures and writes sparsity.json, .csv and .png."""
    from evaluation.observations.plots import plot_sparsity

    source = source_of(given)
    report = Report("sparsity", {**source.config, "k": list(given.k)})
    with progress_bar() as progress:
        for head in progress.track(source.heads(), source.size, description="sparsity"):
            report.results += rows_of(head, given.k)
    means = mean_over(report.results, ("layer", "keys", "k"), FIGURES)
    finish(report, given.out, {"sparsity, mean over query heads": means})
    plot_sparsity(report.results, given.out / "sparsity.png")


def rows_of(head: HeadGroup, ks: Sequence[int]) -> list[Row]:
    """One row for each query head of the group and each k that the context has keys for."""
    n = len(head.keys)
    kept = sorted({min(k, n) for k in ks})
    rows = []
    for q_head, queries in zip(head.q_heads, head.decode_queries, strict=True):
        logits = attention_logits(queries, head.keys, head.scale, head.softcap)
        found = top_k_attention(logits, head.values, kept)
        difference = found.outputs - found.full[:, None]
        norms = np.linalg.norm(found.full, axis=-1)[:, None]
        errors = np.median(np.linalg.norm(difference, axis=-1) / norms, axis=0)
        squares = np.mean(difference**2, axis=(0, 2))
        rows += [
            {
                "layer": head.layer,
                "q_head": q_head,
                "keys": n,
                "k": k,
                "mass": float(found.mass[:, i].mean()),
                "relative_error": float(errors[i]),
                "mean_square_error": float(squares[i]),
            }
            for i, k in enumerate(kept)
        ]
    return rows


def top_k_attention(logits: FloatArray, values: StorageArray, ks: Sequence[int]) -> TopKAttention:
    """Attention from logits [q, n] over values [n, value_dim], for ascending ks of at most n."""
    most = ks[-1]
    weights = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
    weights /= weights.sum(axis=1, keepdims=True)
    full = weights.astype(np.float32) @ np.asarray(values, np.float32)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :most]
    best_weights = np.take_along_axis(weights, best, axis=1)
    mass = np.cumsum(best_weights, axis=1)[:, np.array(ks) - 1].astype(np.float32)
    # Sums between one k and the next, then running sums: each value is gathered once.
    starts = [0, *ks[:-1]]
    outputs = np.empty((len(logits), len(ks), values.shape[1]), np.float32)
    for query, (ids, shares) in enumerate(zip(best, best_weights, strict=True)):
        weighted = shares[:, None] * np.asarray(values[ids], np.float64)
        outputs[query] = np.cumsum(np.add.reduceat(weighted, starts), axis=0)
    return TopKAttention(mass, outputs / mass[..., None], full)
