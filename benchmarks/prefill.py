"""Prefill attention: sparse patterns beside dense flash attention, one run, interleaved.

For each shape and length it times attention chunk by chunk, as prefill runs it: selection (the
pattern's index) and attention apart, the density the executor really had, and the output's error
against dense. Long prompts are sampled: `--chunks` chunks are measured, the last for itself, the
others each for the run of chunks in whose middle it lies; dense and sparse see the same chunks.
On a machine that others use, one thread (OMP_NUM_THREADS=1) and `--clock cpu` leave out the
time in which others ran.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.prefill_heads import Heads, make_heads
from benchmarks.report import Report, argument_parser
from gpu_worker.attention import causal_attention
from gpu_worker.patterns import PATTERNS
from gpu_worker.patterns.adaptive import Adaptive
from gpu_worker.patterns.base import Pattern, PatternResult
from gpu_worker.patterns.executor import attend_selection

CHUNK_ROWS = 2048
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Clock = Callable[[], float]
SHAPES = {"demo 4q/2kv d64": (4, 2, 64), "8q/2kv d128": (8, 2, 128)}
# MInference's own budgets for its patterns, and two settings of ours.
METHODS: dict[str, dict[str, int | float]] = {
    "a_shape": {"sink_tokens": 1024, "window_tokens": 4096},
    "vertical_slash": {"verticals": 1000, "slashes": 2000},
    "block_sparse": {"top_blocks": 100},
    "adaptive": {},
}


@dataclass
class Measured:
    """Sums over the chunks measured."""

    select_s: float = 0.0
    attend_s: float = 0.0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    attended: int = 0
    visible: int = 0


def sampled_chunks(n: int, chunks: int) -> list[tuple[int, int]]:
    """(start, how many chunks it stands for) of the chunks to measure.

    The last one, some of whose rows patterns attend densely, stands for itself only; each of the
    others is the middle of a run of chunks.
    """
    last = -(-n // CHUNK_ROWS) - 1
    runs = min(max(1, chunks - 1), last)
    edges = [i * last // runs for i in range(runs + 1)] if runs else []
    middles = [((low + high - 1) // 2, high - low) for low, high in itertools.pairwise(edges)]
    return [(chunk * CHUNK_ROWS, count) for chunk, count in [*middles, (last, 1)]]


def run_pattern(
    pattern: Pattern, heads: Heads, start: int, state: object, clock: Clock
) -> tuple[PatternResult, float, float]:
    """One chunk: result, seconds of selection, seconds of attention."""
    n, scale = heads.q.shape[1], heads.q.shape[-1] ** -0.5
    stop = min(n, start + CHUNK_ROWS)
    q, k, v = heads.q[:, start:stop], heads.k[:, :stop], heads.v[:, :stop]
    began = clock()
    selection = pattern.select(q, k, start, n, scale, state)
    selected = clock()
    result = attend_selection(q, k, v, start, scale, selection)
    return result, selected - began, clock() - selected


def measure(
    report: Report,
    shape: str,
    n: int,
    chunks: int,
    dtype: torch.dtype,
    methods: Sequence[str],
    clock: Clock,
) -> None:
    """The methods at one length, chunk by chunk in turn."""
    q_heads, kv_heads, d = SHAPES[shape]
    heads = make_heads(n, q_heads, kv_heads, d, dtype)
    patterns = {
        name: PATTERNS[name](**parameters)
        for name, parameters in METHODS.items()
        if name in methods
    }
    states: dict[str, object] = {}
    probe_s = dict.fromkeys(patterns, 0.0)
    for name, pattern in patterns.items():
        if pattern.needs == "prompt":
            began = clock()
            states[name] = pattern.probe(heads.q[:, -64:], heads.k, d**-0.5)
            probe_s[name] = clock() - began
    dense_times: list[float] = []
    dense_s = 0.0
    sums = {name: Measured() for name in patterns}
    for start, count in sampled_chunks(n, chunks):
        stop = min(n, start + CHUNK_ROWS)
        began = clock()
        dense = causal_attention(
            heads.q[:, start:stop], heads.k[:, :stop], heads.v[:, :stop], start, d**-0.5
        )
        dense_times.append(clock() - began)
        dense_s += dense_times[-1] * count
        for name, pattern in patterns.items():
            result, select_s, attend_s = run_pattern(pattern, heads, start, states.get(name), clock)
            each = sums[name]
            each.select_s += select_s * count
            each.attend_s += attend_s * count
            each.squared_error += float((result.output - dense.output).square().sum()) * count
            each.squared_norm += float(dense.output.square().sum()) * count
            each.attended += result.pairs_attended * count
            each.visible += result.pairs_visible * count
    report.add(
        shape=shape, tokens=n, method="dense", total_s=dense_s, select_s=0.0, speedup=1.0,
        density=1.0, output_error=0.0, chunk_median_s=statistics.median(dense_times),
    )  # fmt: skip
    for name, each in sums.items():
        total_s = each.select_s + each.attend_s + probe_s[name]
        report.add(
            shape=shape, tokens=n, method=name, total_s=total_s,
            select_s=each.select_s + probe_s[name], speedup=dense_s / total_s,
            density=each.attended / each.visible,
            output_error=(each.squared_error / each.squared_norm) ** 0.5,
        )  # fmt: skip
        # Up to the threshold `adaptive` is dense attention, so only the call around it may cost.
        limit = 0.97 if n <= Adaptive().dense_below else {32768: 3.0, 131072: 8.0}.get(n)
        if name == "adaptive" and limit:
            report.at_least(f"adaptive over dense, {shape}, {n}", limit, dense_s / total_s, "x")


def main() -> None:
    """Command line."""
    parser = argument_parser("prefill", __doc__ or "")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 131072]
    )
    parser.add_argument("--chunks", type=int, default=8, help="chunks measured per length")
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall",
        help="cpu: the process's CPU time, for one thread on a machine that others use too",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    chunks = 2 if arguments.quick else arguments.chunks
    report = Report(
        "prefill",
        {"chunk_rows": CHUNK_ROWS, "chunks_measured": chunks, "dtype": arguments.dtype,
         "threads": torch.get_num_threads(), "clock": arguments.clock,
         "methods": {name: METHODS[name] for name in arguments.methods}},
        quick=arguments.quick,
    )  # fmt: skip
    with torch.inference_mode():
        for shape in arguments.shapes:
            for n in arguments.lengths:
                if arguments.quick and (n > 32768):
                    report.skip(f"{shape} at {n}", "quick")
                    continue
                measure(
                    report, shape, n, chunks, getattr(torch, arguments.dtype), arguments.methods,
                    CLOCKS[arguments.clock],
                )  # fmt: skip
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
