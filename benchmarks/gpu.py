"""Everything CUDA in one call of under nine minutes: correct first, then how fast.

    python -m benchmarks.gpu --json PATH

Correctness: the Triton kernel against the reference mask, for every pattern, head sizes 64 to 256,
bf16 and fp16, and query heads sharing KV heads; flash attention and merged decode parts likewise.
Speed, in Llama-3-8B's shape (32 query heads, 8 KV heads, head size 128) with synthetic heads:
prefill attention of one layer, sparse beside torch's flash attention, chunk by chunk as prefill
runs it, with the time that building the index takes; and what a decode step does on the device.
Dense attention of long prompts is measured at a few chunks spread over the prompt and scaled up;
sparse attention at the same chunks. Without a GPU nothing is measured, and the report says so.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from benchmarks.prefill_heads import make_heads
from benchmarks.report import Report, argument_parser
from gpu_worker.attention import dense_attention, merge
from gpu_worker.pattern_search.capture import LayerTensors
from gpu_worker.pattern_search.measuring import LayerMeter
from gpu_worker.patterns.base import Pattern
from gpu_worker.patterns.dense import Dense
from gpu_worker.patterns.spec import parse_pattern

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CHUNK_ROWS = 2048
CHUNKS = 6
TARGETS_X = {65_536: 2.0, 131_072: 5.0, 1_048_576: 12.0}
"""Speed-up over dense flash attention at each prompt length."""
INDEX_SHARE_MAX = 0.10
LIMIT_S = 510.0
METHODS = ("adaptive", "vertical_slash:verticals=1000,slashes=2000", "a_shape", "block_sparse")
OURS = "adaptive"
RESIDENT_TOKENS = 640
RUNS = 20


def main() -> int:
    """Command line; 1 when a kernel is wrong, 0 otherwise, also where there is no GPU."""
    arguments = argument_parser("gpu", __doc__ or "").parse_args()
    config = {
        "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "chunk_rows": CHUNK_ROWS,
        "chunks": CHUNKS, "methods": METHODS, "limit_s": LIMIT_S, "gpu": None,
        "triton": importlib.util.find_spec("triton") is not None,
    }  # fmt: skip
    if not torch.cuda.is_available():
        report = Report("gpu", config, quick=arguments.quick)
        for target in target_names():
            report.skip(target, "not run: this machine has no CUDA device")
        report.finish(arguments.json)
        return 0
    report = Report("gpu", {**config, "gpu": torch.cuda.get_device_name()}, quick=arguments.quick)
    deadline = time.monotonic() + LIMIT_S
    wrong = correctness(report, quick=arguments.quick)
    if wrong:
        report.skip("every time", f"{wrong} kernel calls were wrong: nothing wrong is timed")
    else:
        with torch.inference_mode():
            decode(report)
            for tokens in [65_536] if arguments.quick else TARGETS_X:
                prefill(report, tokens, deadline)
    report.finish(arguments.json)
    return 1 if wrong else 0


def target_names() -> list[str]:
    """What this benchmark has targets for."""
    speeds = [f"{OURS} over flash attention at {tokens} tokens" for tokens in TARGETS_X]
    shares = [f"index building of {OURS} at {tokens} tokens" for tokens in TARGETS_X]
    return ["kernel calls unlike the reference", *speeds, *shares]


def correctness(report: Report, *, quick: bool, device: str = "cuda") -> int:
    """Every case; the worst of each kind goes into the report. Returns how many were wrong."""
    # Imported here because Triton compiles for a device that CPU machines do not have.
    from benchmarks.gpu_correctness import (
        TOLERANCES,
        Case,
        cases,
        check_decode,
        check_dense,
        check_pattern,
    )

    checks: dict[str, list[tuple[Case, Callable[[Case, str], float]]]] = {}
    for case in cases((64, 128)) if quick else cases():
        checks.setdefault(case.pattern.split(":")[0], []).append((case, check_pattern))
        if case.pattern == "per_head":
            checks.setdefault("flash attention", []).append((case, check_dense))
            checks.setdefault("decode parts, merged", []).append((case, check_decode))
    wrong = 0
    for kind, found in checks.items():
        worst, message = 0.0, ""
        for case, check in found:
            try:
                excess = check(case, device) / TOLERANCES[case.dtype]
            except (AssertionError, RuntimeError) as error:
                excess, message = float("inf"), f"{case.name}: {error}"[:200]
            wrong += excess > 1
            worst = max(worst, excess)
        report.add(what=f"correct: {kind}", calls=len(found), worst_of_tolerance=worst,
                   note=message)  # fmt: skip
    report.at_most("kernel calls unlike the reference", 0, wrong, "calls")
    return wrong


def prefill(report: Report, tokens: int, deadline: float) -> None:
    """Dense and every method at one length, at the same chunks; the second of two runs counts."""
    if time.monotonic() > deadline:
        for target in target_names():
            if f" {tokens} " in target:
                report.skip(target, f"not run: {LIMIT_S:g} s had passed")
        return
    # One group's heads, copied for every KV head: making all of them would take longer than the
    # measurement.
    heads = make_heads(tokens, Q_HEADS // KV_HEADS, 1, HEAD_DIM, torch.bfloat16)
    q, k, v = (x.cuda().repeat(KV_HEADS, 1, 1) for x in (heads.q, heads.k, heads.v))
    meter = LayerMeter(LayerTensors(0, q, k, v, HEAD_DIM**-0.5), CHUNK_ROWS, CHUNKS)
    whole = -(-tokens // CHUNK_ROWS) / len(meter.starts)
    patterns: dict[str, Pattern] = {text: parse_pattern(text) for text in METHODS}
    dense_s = 0.0
    for name, pattern in {"dense": Dense(), **patterns}.items():
        torch.cuda.reset_peak_memory_stats()
        try:
            meter.run(pattern)
            cost = meter.run(pattern)
        except torch.cuda.OutOfMemoryError as error:
            report.skip(f"{name} at {tokens}", f"out of memory: {error}"[:200])
            torch.cuda.empty_cache()
            continue
        dense_s = dense_s or cost.seconds
        report.add(
            what="prefill attention, one layer", tokens=tokens, method=name,
            seconds=cost.seconds * whole, speedup=dense_s / cost.seconds,
            index_share=cost.index_s / cost.seconds, density=cost.density,
            peak_bytes=torch.cuda.max_memory_allocated(),
        )  # fmt: skip
        if name == OURS:
            report.at_least(
                f"{OURS} over flash attention at {tokens} tokens", TARGETS_X[tokens],
                dense_s / cost.seconds, "x", f"density {cost.density:.3f}",
            )  # fmt: skip
            report.at_most(
                f"index building of {OURS} at {tokens} tokens", INDEX_SHARE_MAX,
                cost.index_s / cost.seconds, "of the attention time",
            )  # fmt: skip


def decode(report: Report) -> None:
    """What one layer of a decode step does on the device, per batch of sessions: resident window,
    queries to the host, retrieved parts back, and the merge."""
    for sessions in (1, 16):
        shape = (sessions, KV_HEADS, Q_HEADS // KV_HEADS, HEAD_DIM)
        q = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        k, v = (
            torch.randn(sessions, KV_HEADS, RESIDENT_TOKENS, HEAD_DIM, device="cuda").bfloat16()
            for _ in range(2)
        )
        remote = torch.randn(shape), torch.randn(shape[:-1])
        part = dense_attention(q, k, v, HEAD_DIM**-0.5)
        retrieved = type(part)(*(x.cuda() for x in remote))
        pieces: dict[str, Callable[[], object]] = {
            "resident window": partial(dense_attention, q, k, v, HEAD_DIM**-0.5),
            "queries to host": q.cpu,
            "retrieved parts to device": partial(_to_device, remote),
            "merge": partial(merge, part, retrieved),
        }
        for name, work in pieces.items():
            report.add(what=f"decode: {name}", sessions=sessions, us_median=median_us(work))


def median_us(work: Callable[[], object]) -> float:
    """Median of RUNS runs, each with the device idle before and after, microseconds."""
    times = []
    for _ in range(RUNS + 3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        _settle(work())
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:]) * 1e6


def _to_device(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [x.cuda() for x in tensors]


def _settle(result: object) -> None:
    if not (isinstance(result, Tensor) and not result.is_cuda):
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
