"""`compare`: the patterns side by side at equal measured cost (MInference 1.0, table 1).

In every layer each published candidate is sized until it costs what a_shape with 1024 and 4096
costs (as `longreach search-patterns` does); `adaptive` and dense are shown at the cost they have.
Recall is the share of a row's attention mass on the keys attended, exp(lse - lse of dense).
"""

from __future__ import annotations

import argparse

from torch import Tensor

from benchmarks.report import Report
from evaluation.encoding import load_encoder
from evaluation.fingerprint import model_fingerprint
from evaluation.observations.reporting import finish, mean_over
from evaluation.prefill_figures.plots import plot_comparison
from evaluation.prefill_figures.prompts import each_layer, make_prompts
from gpu_worker.attention import causal_attention
from gpu_worker.model import load_model
from gpu_worker.pattern_search import SearchConfig
from gpu_worker.pattern_search.capture import LayerTensors
from gpu_worker.pattern_search.measuring import LayerMeter
from gpu_worker.pattern_search.search import search_layer
from gpu_worker.patterns.adaptive import Adaptive
from gpu_worker.patterns.base import Pattern, PatternResult
from gpu_worker.patterns.dense import Dense
from gpu_worker.patterns.head_choices import HeadChoice

SPATIAL_FORMS = {
    "a_shape": "static: first tokens and a window",
    "vertical_slash": "dynamic: columns and diagonals",
    "block_sparse": "dynamic: blocks",
    "adaptive": "dynamic: blocks by mass",
    "dense": "everything",
}


def run(given: argparse.Namespace) -> None:
    """Measures and writes compare.json, compare.csv and compare.png."""
    model = load_model(given.model)
    prompts = make_prompts(load_encoder(given.model), given.tokens, given.prompts)
    config = {
        "model": model_fingerprint(given.model), "tokens": given.tokens, "chunks": given.chunks,
        "chunk_rows": given.chunk_rows, "prompts": [name for name, _ in prompts],
    }  # fmt: skip
    report = Report("compare", config)

    def visit(name: str, tensors: LayerTensors) -> None:
        meter = LayerMeter(tensors, given.chunk_rows, given.chunks)
        lse = dense_lse(meter)
        outputs = meter.dense()
        for label, pattern in contenders(tensors, given.chunk_rows, given.chunks):
            kept = KeptMass(lse)
            cost = meter.run(pattern, kept)
            _, errors = meter.errors(pattern, outputs)
            report.add(
                prompt=name, layer=tensors.layer, pattern=label,
                form=SPATIAL_FORMS[pattern.name], ms=cost.seconds * 1e3,
                index_share=cost.index_s / max(cost.seconds, 1e-12), density=cost.density,
                recall=kept.mean, output_error=sum(errors) / len(errors),
            )  # fmt: skip

    each_layer(model, prompts, visit)
    plot_comparison(report.results, given.out / "compare.png")
    figures = ("ms", "index_share", "density", "recall", "output_error")
    rows = mean_over(report.results, ("pattern", "form"), figures)
    finish(report, given.out, {"patterns at equal cost, mean over layers and prompts": rows})


def contenders(tensors: LayerTensors, chunk_rows: int, chunks: int) -> list[tuple[str, Pattern]]:
    """Every candidate at the target's cost, and what is compared with them, by label."""
    config = SearchConfig(chunk_rows=chunk_rows, chunks=chunks)
    found: list[tuple[str, Pattern]] = []
    for row in search_layer(tensors, config)["candidates"]:
        pattern = HeadChoice(row["pattern"], tuple(row["parameters"].items())).build()
        found.append((row["candidate"] + ("" if row["fits"] else " (dearer)"), pattern))
    # Without the means of what it left out, so that its lse counts attended keys alone.
    adaptive = Adaptive(dense_below=0, dense_first_rows=0, mean_correction=False)
    return [*found, ("adaptive, no means", adaptive), ("dense", Dense())]


def dense_lse(meter: LayerMeter) -> dict[int, Tensor]:
    """Log-sum-exp [q_heads, rows] of dense attention, by chunk start."""
    t = meter.tensors
    found = {}
    for start in meter.starts:
        stop = min(t.tokens, start + meter.chunk_rows)
        found[start] = causal_attention(
            t.q[:, start:stop], t.k[:, :stop], t.v[:, :stop], start, t.scale
        ).lse
    return found


class KeptMass:
    """Takes a pattern's results; `mean`: the mass on attended keys, mean over heads and rows."""

    def __init__(self, lse: dict[int, Tensor]) -> None:
        self._lse = lse
        self._sum = 0.0
        self._rows = 0

    def __call__(self, start: int, result: PatternResult) -> None:
        """One chunk's result."""
        share = (result.lse - self._lse[start]).exp()
        self._sum += float(share.sum())
        self._rows += share.numel()

    @property
    def mean(self) -> float:
        """Between 0 and 1."""
        return self._sum / max(1, self._rows)
