"""Everything CUDA against the plain reference: run before anything is timed (benchmarks/gpu.py).

A case is one kernel call; its tolerance follows from the dtype: the reference computes in fp32 from
the same 16-bit inputs, so only the weights and the output are rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpu_worker.attention import (
    Partial,
    blockwise_attention,
    causal_attention,
    dense_attention,
    merge,
)
from gpu_worker.kernels.sparse_prefill import attend_selection_triton
from gpu_worker.patterns.head_choices import HeadChoice
from gpu_worker.patterns.per_head import per_head_layer
from gpu_worker.patterns.reference import attend_reference
from gpu_worker.patterns.spec import parse_pattern

PATTERN_TEXTS = (
    "a_shape:sink_tokens=64,window_tokens=192",
    "vertical_slash:verticals=60,slashes=150",
    "block_sparse:top_blocks=3",
    "adaptive:min_share=0.005,dense_below=0,dense_first_rows=0,dense_last_rows=32",
)
MIXED = (
    HeadChoice("a_shape", (("sink_tokens", 64), ("window_tokens", 192))),
    HeadChoice("vertical_slash", (("verticals", 60), ("slashes", 150))),
    HeadChoice("block_sparse", (("top_blocks", 3),)),
    HeadChoice("vertical_slash", (("verticals", 90), ("slashes", 110))),
)
HEAD_SIZES = (64, 80, 96, 128, 192, 256)
DTYPES = ("bfloat16", "float16")
GROUPS = ((4, 1), (4, 4), (8, 2))
TOLERANCES = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 2e-5}
"""Largest error of an output whose values are about 1, and of a log-sum-exp."""

ROWS = 700
START = 256


@dataclass(frozen=True, slots=True)
class Case:
    """One call: what is attended, the shape and the dtype. `pattern` "per_head" mixes patterns."""

    pattern: str
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def name(self) -> str:
        """For the report."""
        kind = self.pattern.split(":")[0]
        return f"{kind} {self.q_heads}q/{self.kv_heads}kv d{self.head_dim} {self.dtype}"


def cases(
    head_sizes: tuple[int, ...] = HEAD_SIZES, dtypes: tuple[str, ...] = DTYPES
) -> Iterator[Case]:
    """Every pattern, head size and dtype; every grouping at one head size, because each compiles
    kernels of its own."""
    for pattern in (*PATTERN_TEXTS, "per_head"):
        for head_dim in head_sizes:
            for dtype in dtypes:
                for q_heads, kv_heads in GROUPS if head_dim == 128 else GROUPS[:1]:
                    yield Case(pattern, q_heads, kv_heads, head_dim, dtype)


def random_heads(case: Case, device: str, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [q_heads, rows, d], k and v [kv_heads, rows, d]."""
    g = torch.Generator().manual_seed(rows + case.head_dim)
    dtype = getattr(torch, case.dtype)
    shapes = (case.q_heads, case.kv_heads, case.kv_heads)
    q, k, v = (torch.randn(heads, rows, case.head_dim, generator=g) for heads in shapes)
    return tuple(x.to(device, dtype) for x in (2 * q, k, v))


def check_pattern(case: Case, device: str, rows: int = ROWS, start: int = START) -> float:
    """Largest difference of output and lse between the Triton kernel and the reference mask.

    Raises AssertionError where the pairs counted differ.
    """
    q, k, v = random_heads(case, device, rows)
    scale = case.head_dim**-0.5
    if case.pattern == "per_head":
        choices = [MIXED[head % len(MIXED)] for head in range(case.q_heads)]
        pattern: Any = per_head_layer(choices, case.kv_heads)
    else:
        pattern = parse_pattern(case.pattern)
    state = pattern.probe(q[:, -64:], k, scale) if pattern.needs == "prompt" else None
    selection = pattern.select(q[:, start:], k, start, rows, scale, state)
    assert selection is not None, f"{case.name}: nothing was left out of {rows} tokens"
    got = attend_selection_triton(q[:, start:], k, v, start, scale, selection)
    columns = None if selection.columns is None else selection.columns.cpu()
    plain = replace(selection, blocks=selection.blocks.cpu(), columns=columns)
    want = attend_reference(q[:, start:].cpu(), k.cpu(), v.cpu(), start, scale, plain)
    counted = (got.pairs_attended, got.pairs_visible)
    assert counted == (want.pairs_attended, want.pairs_visible), f"{case.name}: pairs differ"
    return max(_difference(got.output, want.output), _difference(got.lse, want.lse))


def check_dense(case: Case, device: str, rows: int = ROWS, start: int = START) -> float:
    """The same for causal attention of a chunk: torch's flash attention, with log-sum-exp."""
    q, k, v = random_heads(case, device, rows)
    scale = case.head_dim**-0.5
    got = causal_attention(q[:, start:], k, v, start, scale)
    want = attend_reference(q[:, start:].cpu(), k.cpu(), v.cpu(), start, scale, None)
    return max(_difference(got.output, want.output), _difference(got.lse, want.lse))


def check_decode(case: Case, device: str, rows: int = ROWS) -> float:
    """The same for decode: a resident part and a retrieved part, merged, against everything."""
    q, k, v = random_heads(case, device, rows)
    scale = case.head_dim**-0.5
    group = case.q_heads // case.kv_heads
    folded = q[:, -1].reshape(1, case.kv_heads, group, case.head_dim)
    cut = rows // 3
    parts = [
        dense_attention(folded, k[None, :, part], v[None, :, part], scale)
        for part in (slice(0, cut), slice(cut, None))
    ]
    got = merge(*parts)
    want = blockwise_attention(folded.cpu(), k[None].cpu(), v[None].cpu(), scale)
    return max(_difference(*pair) for pair in zip(Partial(*got), want, strict=True))


def _difference(got: Tensor, want: Tensor) -> float:
    return float((got.float().cpu() - want.float()).abs().max())
