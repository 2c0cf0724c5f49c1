"""How much faster a layer of eight KV heads is answered by two threads than by one."""

from __future__ import annotations

import os
import time

import numpy as np

from benchmarks.report import Report
from benchmarks.scene import Scene, build_over, flush
from longreach.types import BFLOAT16, Budget, Span
from retrieval_node import kernel
from retrieval_node.index.base import IndexRows, LayerKv

KV_HEADS = 8
TURNS = 12
FASTER = 1.8


def measure_threads(scene: Scene, report: Report) -> None:
    """Adds a target for exact attention and one for the sketch: wall time, cold, medians."""
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        report.skip("two threads against one", f"{cores} core is available")
        return
    keys, values = (
        np.repeat(np.asarray(part).view(np.uint16), KV_HEADS, axis=0).view(BFLOAT16)
        for part in (scene.kv.keys, scene.kv.values)
    )
    kv = LayerKv(keys, values, 0)
    queries = np.repeat(scene.queries[:1], KV_HEADS, axis=1)
    for kind, budget in (("flat", Budget(exact=True)), ("sketch", Budget(top_k=100))):
        index = build_over(kind, kv, scene.layer_sample(KV_HEADS))
        rows = IndexRows(queries, 0, Span(0, scene.keys), budget)
        times: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(TURNS):
            for threads in (1, 2) if turn % 2 else (2, 1):
                kernel.set_threads(threads)
                flush()
                began = time.perf_counter()
                index.attend([rows], scene.work.scale)
                times[threads].append(time.perf_counter() - began)
        one, two = (float(np.median(times[threads])) for threads in (1, 2))
        report.at_least(
            f"two threads over one, {kind}, {KV_HEADS} KV heads of {scene.keys} keys",
            FASTER,
            one / two,
            "x",
            f"{one * 1e3:.3g} ms against {two * 1e3:.3g} ms; {cores} cores, free or not",
        )
    kernel.set_threads(1)
