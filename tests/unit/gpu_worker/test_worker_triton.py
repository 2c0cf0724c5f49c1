"""The Triton kernel equals the reference mask; on machines without a GPU in Triton's interpreter.

The interpreter is chosen when Triton is first imported, so the kernel runs in a process of its own
there.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

CASES = [
    # pattern, parameters, q heads, kv heads, n, head dim, dtype, tolerance
    ("a_shape", {"sink_tokens": 64, "window_tokens": 128}, 2, 1, 300, 64, "float32", 2e-5),
    ("block_sparse", {"top_blocks": 3}, 4, 2, 333, 80, "float32", 2e-5),
    ("vertical_slash", {"verticals": 60, "slashes": 110}, 2, 2, 400, 96, "float32", 2e-5),
    ("adaptive", {"min_share": 0.01, "dense_below": 0, "dense_first_rows": 0, "dense_last_rows": 0},
     4, 2, 600, 64, "float32", 2e-5),
    ("adaptive", {"min_share": 0.01, "dense_below": 0, "dense_first_rows": 0, "dense_last_rows": 0},
     2, 1, 520, 128, "float16", 4e-3),
]  # fmt: skip

SCRIPT = """
import sys, torch
from gpu_worker.kernels.sparse_prefill import attend_selection_triton
from gpu_worker.patterns import PATTERNS
from gpu_worker.patterns.reference import attend_reference
name, parameters, q_heads, kv_heads, n, d, dtype, tolerance = eval(sys.argv[1])
device = sys.argv[2]
g = torch.Generator().manual_seed(n)
q, k, v = (torch.randn(h, n, d, generator=g).to(device, getattr(torch, dtype))
           for h in (q_heads, kv_heads, kv_heads))
pattern, scale, start = PATTERNS[name](**parameters), d**-0.5, n // 2 // 128 * 128
state = pattern.probe(q, k, scale) if pattern.needs == "prompt" else None
selection = pattern.select(q[:, start:], k, start, n, scale, state)
want = attend_reference(q[:, start:].cpu(), k.cpu(), v.cpu(), start, scale, selection)
got = attend_selection_triton(q[:, start:], k, v, start, scale, selection)
assert (got.output.cpu() - want.output).abs().max() < tolerance, "output"
assert (got.lse.cpu() - want.lse).abs().max() < tolerance, "lse"
assert (got.pairs_attended, got.pairs_visible) == (want.pairs_attended, want.pairs_visible)
print("equal", got.density)
"""


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[5]}-{case[6]}")
def test_the_kernel_equals_the_reference_mask(case: tuple[object, ...]) -> None:
    cuda = torch.cuda.is_available()
    environment = dict(os.environ) if cuda else {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, repr(case), "cuda" if cuda else "cpu"],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("equal")
