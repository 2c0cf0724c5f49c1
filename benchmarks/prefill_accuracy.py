"""Output error of prefill patterns at equal density, on synthetic heads and on the demo model's.

Each pattern has one budget; for each density the budget is searched so that the pairs really
attended, over all layers and heads together, are that share of the causal pairs. The error is
|output - dense| / |dense| over all rows measured (Frobenius norms). Vertical-slash is run with each
of the vertical to slash ratios of MInference's search space, and the best counts.

`density` counts pairs attended one by one. `adaptive` also attends one mean per block of 64 keys,
1/64 of the causal pairs: `work` counts these too, and `adaptive, no means` is the same selection
without them. A row that could not come within a tenth of its density says so in `reached`: what a
pattern always attends may be more. Targets compare where both reached it.

Seeds 0 and 1 were used while `adaptive` was written; seed 2 and its haystack were not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.prefill_heads import Heads, make_heads
from benchmarks.prefill_model_heads import model_heads
from benchmarks.report import Report, argument_parser
from gpu_worker.attention import causal_attention
from gpu_worker.patterns.a_shape import AShape
from gpu_worker.patterns.adaptive import Adaptive
from gpu_worker.patterns.base import KEY_BLOCK, Pattern, left_out_keys
from gpu_worker.patterns.block_sparse import BlockSparse
from gpu_worker.patterns.dilated import Dilated
from gpu_worker.patterns.executor import attend_selection
from gpu_worker.patterns.strided import Strided
from gpu_worker.patterns.top_k import TopK
from gpu_worker.patterns.vertical_slash import VerticalSlash

ROWS = 128
DENSITIES = (0.02, 0.05, 0.10, 0.20)
RATIOS = ((30, 2048), (100, 1800), (500, 1500), (3000, 200))
SEARCH_STEPS = 10
NEAR = 0.1
FAR_POSITION = 1 << 40
"""As the prompt's length: none of the rows measured is among its last, which may be dense."""

Make = Callable[[float], Pattern]


def _a_shape(budget: float) -> Pattern:
    return AShape(sink_tokens=64, window_tokens=int(budget))


def _block_sparse(budget: float) -> Pattern:
    return BlockSparse(top_blocks=max(1, int(budget / KEY_BLOCK)))


def _vertical_slash(ratio: tuple[int, int], budget: float) -> Pattern:
    share = budget / sum(ratio)
    return VerticalSlash(
        verticals=max(1, round(ratio[0] * share)), slashes=max(1, round(ratio[1] * share))
    )


def _top_k(budget: float) -> Pattern:
    return TopK(keys=max(1, int(budget)))


def _dilated(budget: float) -> Pattern:
    return Dilated(sink_tokens=64, window_tokens=max(2, int(budget)))


def _strided(budget: float) -> Pattern:
    return Strided(
        sink_tokens=64, window_tokens=int(budget / 2), reach_tokens=max(8, int(4.5 * budget))
    )


def _adaptive(mean_correction: bool, budget: float) -> Pattern:
    """The budget is how many keys of equal share would reach the threshold."""
    return Adaptive(
        min_share=1 / budget,
        max_keys=1 << 30,
        dense_below=0,
        dense_first_rows=0,
        mean_correction=mean_correction,
    )


METHODS: dict[str, tuple[Make, ...]] = {
    "a_shape": (_a_shape,),
    "block_sparse": (_block_sparse,),
    "vertical_slash": tuple(partial(_vertical_slash, ratio) for ratio in RATIOS),
    "dilated": (_dilated,),
    "strided": (_strided,),
    "adaptive": (partial(_adaptive, True),),
    "adaptive, no means": (partial(_adaptive, False),),
    "top_k (reference)": (_top_k,),
}
BUDGETS_MAX = {"adaptive": 1e12, "adaptive, no means": 1e12}


@dataclass(frozen=True, slots=True)
class Run:
    """Sums over layers and places of the prompt."""

    density: float
    work: float
    error: float


class Layer:
    """One layer's heads and dense outputs of ROWS rows at each of some places of the prompt."""

    def __init__(self, heads: Heads, places: int) -> None:
        self.heads = heads
        n = heads.q.shape[1]
        self.scale = heads.q.shape[-1] ** -0.5
        self.starts = [int((i + 0.8) / places * n) // ROWS * ROWS for i in range(places)]
        self.dense = [
            causal_attention(*self.chunk(start), start, self.scale).output for start in self.starts
        ]

    def chunk(self, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the place, and the keys and values up to it."""
        stop = start + ROWS
        return self.heads.q[:, start:stop], self.heads.k[:, :stop], self.heads.v[:, :stop]


def run(layers: Sequence[Layer], pattern: Pattern) -> Run:
    """Attends every place of every layer."""
    attended = visible = means = 0
    error = norm = 0.0
    for layer in layers:
        state = None
        if pattern.needs == "prompt":
            state = pattern.probe(layer.heads.q[:, -64:], layer.heads.k, layer.scale)
        for start, dense in zip(layer.starts, layer.dense, strict=True):
            q, k, v = layer.chunk(start)
            selection = pattern.select(q, k, start, FAR_POSITION, layer.scale, state)
            result = attend_selection(q, k, v, start, layer.scale, selection)
            attended += result.pairs_attended
            visible += result.pairs_visible
            if selection is not None and selection.mean_correction:
                left = left_out_keys(selection, start, (start + ROWS) // KEY_BLOCK)
                means += int((left > 0).sum()) * selection.query_block
            error += float((result.output - dense).square().sum())
            norm += float(dense.square().sum())
    return Run(attended / visible, (attended + means) / visible, (error / norm) ** 0.5)


def at_density(layers: Sequence[Layer], make: Make, density: float, most: float) -> Run:
    """The run whose density comes nearest, by bisection of the budget's logarithm."""
    low, high = 1.0, most
    best: Run | None = None
    for _ in range(SEARCH_STEPS):
        budget = (low * high) ** 0.5
        found = run(layers, make(budget))
        if best is None or abs(found.density - density) < abs(best.density - density):
            best = found
        if abs(found.density / density - 1) < NEAR / 5:
            break
        low, high = (low, budget) if found.density > density else (budget, high)
    assert best is not None
    return best


def measure(report: Report, data: str, seed: int, layers: Sequence[Layer], quick: bool) -> None:
    """All methods at all densities on one set of heads."""
    n = layers[0].heads.q.shape[1]
    for density in DENSITIES[1::2] if quick else DENSITIES:
        found: dict[str, Run] = {}
        for name, variants in METHODS.items():
            most = BUDGETS_MAX.get(name, 2.0 * n)
            runs = [at_density(layers, make, density, most) for make in variants]
            # One that missed the density by less is the better one; then the smaller error.
            best = min(runs, key=lambda r: (not _reached(r, density), r.error))
            found[name] = best
            report.add(
                data=data, seed=seed, tokens=n, density_wanted=density, method=name,
                density=best.density, work=best.work, output_error=best.error,
                reached=_reached(best, density),
            )  # fmt: skip
        others = {
            name: each.error
            for name, each in found.items()
            if name in ("a_shape", "block_sparse", "vertical_slash") and _reached(each, density)
        }
        if others and _reached(found["adaptive"], density):
            best_other = min(others, key=lambda name: others[name])
            report.at_most(
                f"adaptive's error, {data} seed {seed}, density {density:.0%}",
                others[best_other], found["adaptive"].error, "relative", f"limit: {best_other}",
            )  # fmt: skip


def _reached(found: Run, density: float) -> bool:
    return abs(found.density / density - 1) <= NEAR


def main() -> None:
    """Command line."""
    parser = argument_parser("prefill_accuracy", __doc__ or "")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--places", type=int, default=3, help="places of ROWS rows per layer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    arguments = parser.parse_args()
    tokens = 16_384 if arguments.quick else arguments.tokens
    seeds = arguments.seeds[-1:] if arguments.quick else arguments.seeds
    report = Report(
        "prefill_accuracy",
        {"tokens": tokens, "rows": ROWS, "places": arguments.places, "seeds": seeds,
         "model": str(arguments.model)},
        quick=arguments.quick,
    )  # fmt: skip
    with torch.inference_mode():
        for seed in seeds:
            for shape in ((4, 2, 64), (8, 2, 128)):
                heads = make_heads(tokens, *shape, torch.float32, seed)
                name = f"synthetic {shape[0]}q/{shape[1]}kv d{shape[2]}"
                places = 1 if arguments.quick else arguments.places
                measure(report, name, seed, [Layer(heads, places)], arguments.quick)
            haystack = {0: "mixed", 1: "kv"}.get(seed, "prose")
            layers = model_heads(arguments.model, haystack, tokens, seed)
            places = 1 if arguments.quick else arguments.places
            measure(
                report, f"demo model, {haystack}", seed,
                [Layer(heads, places) for heads in layers], arguments.quick,
            )  # fmt: skip
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
