"""`latency`: attention time of one layer over prompt length, and density, beside dense.

Heads are synthetic, with the structures that trained models show (benchmarks/prefill_heads.py), in
the shape of the model's first layer. Long prompts are measured at some chunks and scaled up.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.prefill_heads import make_heads
from benchmarks.report import Report
from evaluation.fingerprint import model_fingerprint
from evaluation.observations.reporting import finish
from evaluation.prefill_figures.plots import plot_latency
from gpu_worker.model import load_model
from gpu_worker.pattern_search.capture import LayerTensors
from gpu_worker.pattern_search.measuring import LayerMeter
from gpu_worker.patterns.base import Pattern
from gpu_worker.patterns.dense import Dense
from gpu_worker.patterns.per_head import MInference
from gpu_worker.patterns.spec import canonical, pattern_for_model


def run(given: argparse.Namespace) -> None:
    """Measures and writes latency.json, latency.csv and latency.png."""
    model = load_model(given.model)
    patterns: dict[str, Pattern] = {"dense": Dense()}
    for text in given.patterns:
        pattern = pattern_for_model(text, model.info)
        patterns[canonical(pattern)] = pattern
    config = {
        "model": model_fingerprint(given.model), "chunks": given.chunks,
        "chunk_rows": given.chunk_rows, "patterns": list(patterns), "device": str(model.device),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    report = Report("latency", config)
    layer = model.layers[0]
    with torch.inference_mode():
        for tokens in given.lengths:
            heads = make_heads(tokens, layer.q_heads, layer.kv_heads, layer.head_dim, model.dtype)
            q, k, v = (x.to(model.device) for x in (heads.q, heads.k, heads.v))
            tensors = LayerTensors(0, q, k, v, layer.head_dim**-0.5)
            measure(report, tensors, patterns, given.chunk_rows, given.chunks)
    plot_latency(report.results, given.out / "latency.png")
    shown = [{k: v for k, v in row.items() if k != "pattern"} for row in report.results]
    finish(report, given.out, {"attention of one layer": shown})


def measure(
    report: Report,
    tensors: LayerTensors,
    patterns: dict[str, Pattern],
    chunk_rows: int,
    chunks: int,
) -> None:
    """All patterns at one length, interleaved; the second of two runs counts."""
    meter = LayerMeter(tensors, chunk_rows, chunks)
    whole = -(-tensors.tokens // chunk_rows) / len(meter.starts)
    layers = {name: pattern.for_layer(0) for name, pattern in patterns.items()}
    for pattern in layers.values():
        meter.run(pattern)
    costs = {name: meter.run(pattern) for name, pattern in layers.items()}
    for name, cost in costs.items():
        is_file = isinstance(patterns[name], MInference)
        report.add(
            method=MInference.name if is_file else patterns[name].name, pattern=name,
            tokens=tensors.tokens, seconds=cost.seconds * whole, index_s=cost.index_s * whole,
            density=cost.density, speedup=costs["dense"].seconds / cost.seconds,
        )  # fmt: skip
