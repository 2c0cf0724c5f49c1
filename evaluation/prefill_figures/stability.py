"""`stability`: does a head keep its pattern from prompt to prompt?

For every prompt each head gets the candidate of the published space whose output is nearest to
dense attention's, at the published sizes in proportion to the prompt. A head's stability is the
share of prompts that agree with its most frequent pattern: an offline search pays where it is near
1 (MInference 1.0, section 2.2).
"""

from __future__ import annotations

import argparse
from collections import Counter

from benchmarks.report import Report
from evaluation.encoding import load_encoder
from evaluation.fingerprint import model_fingerprint
from evaluation.observations.reporting import Row, finish
from evaluation.prefill_figures.plots import plot_stability
from evaluation.prefill_figures.prompts import each_layer, make_prompts
from gpu_worker.model import load_model
from gpu_worker.pattern_search.capture import LayerTensors
from gpu_worker.pattern_search.measuring import LayerMeter
from gpu_worker.pattern_search.space import SPACE, space_scale
from gpu_worker.patterns.per_head import per_head_layer


def run(given: argparse.Namespace) -> None:
    """Measures and writes stability.json, stability.csv and stability.png."""
    model = load_model(given.model)
    prompts = make_prompts(load_encoder(given.model), given.tokens, given.prompts)
    config = {
        "model": model_fingerprint(given.model), "tokens": given.tokens, "chunks": given.chunks,
        "chunk_rows": given.chunk_rows, "space_scale": space_scale(given.tokens),
        "prompts": [name for name, _ in prompts],
    }  # fmt: skip
    report = Report("stability", config)

    def visit(name: str, tensors: LayerTensors) -> None:
        errors = candidate_errors(tensors, given.chunk_rows, given.chunks)
        for head in range(tensors.q.shape[0]):
            best = min(errors, key=lambda each: errors[each][head])
            report.add(
                prompt=name, layer=tensors.layer, q_head=head, pattern=best.split("(")[0],
                candidate=best, error=errors[best][head],
            )  # fmt: skip

    each_layer(model, prompts, visit)
    rows = summary(report.results)
    plot_stability(report.results, given.out / "stability.png")
    mean = sum(float(row["stability"]) for row in rows) / max(1, len(rows))
    note = f"{mean:.0%} of the prompts agree with a head's most frequent pattern, mean over heads"
    finish(report, given.out, {"pattern of each head": rows}, note)


def candidate_errors(tensors: LayerTensors, chunk_rows: int, chunks: int) -> dict[str, list[float]]:
    """Relative output error of each query head under each candidate, by the candidate's name."""
    meter = LayerMeter(tensors, chunk_rows, chunks)
    dense, heads = meter.dense(), tensors.q.shape[0]
    errors = {}
    for candidate in SPACE:
        choice = candidate.scaled(space_scale(tensors.tokens))
        pattern = per_head_layer([choice] * heads, tensors.k.shape[0])
        _, errors[candidate.name] = meter.errors(pattern, dense)
    return errors


def summary(rows: list[Row]) -> list[Row]:
    """Each head's most frequent pattern, and the share of prompts that agree with it."""
    heads: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        heads.setdefault((row["layer"], row["q_head"]), []).append(row["pattern"])
    return [
        {
            "layer": layer,
            "q_head": head,
            "pattern": (most := Counter(patterns).most_common(1)[0])[0],
            "stability": most[1] / len(patterns),
        }
        for (layer, head), patterns in heads.items()
    ]
