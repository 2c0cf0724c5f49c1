"""`dynamics`: do the keys that matter change from step to step?

For every decode step, k keys of the context are chosen by one of three rules, and the share of the
step's attention mass on them is measured, and how many of the step's own best k are among them:

* per_step: the step's own best k, the most that k keys can hold;
* previous_step: the best k of the step before;
* static: the best k by mean attention of the prompt's last window, chosen once.

MInference's authors report 89% against 71% of the attention for the best 1000 keys, chosen per step
and chosen once, over 100K tokens of key-value retrieval in Llama-3-8B.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.report import Report
from evaluation.observations.heads import HeadGroup, add_source_flags, source_of
from evaluation.observations.reporting import Row, finish, mean_over, progress_bar, write_csv
from longreach.attention import attention_logits
from longreach.types import FloatArray, IntArray

TOP_K = (100, 1000)
WINDOW = 64
RULES = ("per_step", "previous_step", "static")
FIGURES = ("mass", "set_recall")


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a rule's keys hold at each step: mass [steps] and set recall [steps], in [0, 1]."""

    mass: FloatArray
    set_recall: FloatArray


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("dynamics", help="keys chosen per step against chosen once")
    parser.description = __doc__
    add_source_flags(parser, n=32_768)
    parser.add_argument("--k", type=int, nargs="+", default=TOP_K, help="numbers of keys kept")
    parser.add_argument(
        "--window",
        type=int,
        default=WINDOW,
        help=f"last prompt queries that choose for `static` (default {WINDOW})",
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Measures and writes dynamics.json, .csv, -steps.csv and .png."""
    from evaluation.observations.plots import plot_dynamics

    source = source_of(given)
    config = {**source.config, "k": list(given.k), "window": given.window}
    report = Report("dynamics", config)
    steps: list[Row] = []
    with progress_bar() as progress:
        for head in progress.track(source.heads(), source.size, description="dynamics"):
            rows = step_rows(head, given.k, given.window)
            report.results += mean_over(rows, ("layer", "q_head", "keys", "k", "rule"), FIGURES)
            steps += rows
    means = mean_over(report.results, ("layer", "keys", "k", "rule"), FIGURES)
    finish(report, given.out, {"dynamics, mean over query heads and steps": means})
    write_csv(steps, given.out / "dynamics-steps.csv")
    plot_dynamics(steps, given.out / "dynamics.png")


def step_rows(head: HeadGroup, ks: Sequence[int], window: int) -> list[Row]:
    """One row for each query head of the group, k, rule and step."""
    n = len(head.keys)
    rows = []
    for g, q_head in enumerate(head.q_heads):
        weights = attention_of(head, head.decode_queries[g])
        before = attention_of(
            head, head.prefill_queries[g, -window:], head.prefill_positions[-window:]
        )
        for k in sorted({min(k, n) for k in ks}):
            for rule, found in recovered(weights, before, k).items():
                rows += [
                    {
                        "layer": head.layer,
                        "q_head": q_head,
                        "keys": n,
                        "k": k,
                        "rule": rule,
                        "step": step,
                        "mass": float(found.mass[step]),
                        "set_recall": float(found.set_recall[step]),
                    }
                    for step in range(len(weights))
                ]
    return rows


def recovered(weights: FloatArray, before: FloatArray, k: int) -> Mapping[str, Recovered]:
    """What each rule's k keys hold.

    weights [steps, n]: attention of consecutive steps over the context; before [window, n]:
    attention of the prompt's last queries, in order.
    """
    own = best_keys(weights, k)
    chosen = {
        "per_step": own,
        "previous_step": np.concatenate([best_keys(before[-1:], k), own[:-1]]),
        "static": np.repeat(best_keys(before.mean(axis=0)[None], k), len(weights), axis=0),
    }
    return {rule: _held(weights, own, chosen[rule]) for rule in RULES}


def best_keys(weights: FloatArray, k: int) -> IntArray:
    """Ids [rows, k] of the k largest of each row of weights [rows, n], in no order."""
    return np.argpartition(-weights, min(k, weights.shape[1]) - 1, axis=1)[:, :k]


def attention_of(
    head: HeadGroup, queries: FloatArray, positions: IntArray | None = None
) -> FloatArray:
    """Attention weights [rows, n] of queries [rows, d]; of prompt queries up to their positions."""
    logits = attention_logits(queries, head.keys, head.scale, head.softcap)
    if positions is not None:
        later = np.arange(len(head.keys)) > positions[:, None]
        logits = np.where(later, np.float32(-np.inf), logits)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def _held(weights: FloatArray, own: IntArray, chosen: IntArray) -> Recovered:
    mass = np.take_along_axis(weights, chosen, axis=1).sum(axis=1)
    is_chosen = np.zeros(weights.shape, bool)
    np.put_along_axis(is_chosen, chosen, True, axis=1)
    recall = np.take_along_axis(is_chosen, own, axis=1).mean(axis=1)
    return Recovered(mass, recall.astype(np.float32))
