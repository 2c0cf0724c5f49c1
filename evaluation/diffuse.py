"""Diffuse heads: attention that a hundred keys do not carry, made without a model.

The demo model's attention is sharp, so its accuracy cannot tell a budget of 100 keys from one that
keeps the mass. Here a synthetic head (benchmarks/synthetic.py) spreads its mass so that even the
exact top 100 leave an error of about .3 in the output. Every method attends the same head through
the code that runs on models (library/), with at least as many keys as the default reads in full
precision, its sink and window included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.report import Report
from benchmarks.synthetic import Workload, workload
from evaluation.defaults import BUDGET
from gpu_worker.arrays import to_tensor
from gpu_worker.attention import LayerCall
from library.decode import parse_decode
from library.decode.base import OBSERVED_QUERIES, LayerContext, QueryRecord
from library.layer import LayerDecoder
from longreach.types import LayerGeometry, WorkFigures

DIFFUSE = "diffuse"
"""The word among --tasks that asks for this."""
DEFAULT_DECODE = f"auto:{BUDGET}"
EXACT_TOP = "flat:top_k=100"
OTHER_BUDGETS = ("auto:top_k=100+tail", "auto:mass=0.95[64,1024]+tail")

KEYS = 131_072
QUICK_KEYS = 16_384
SHARE_MAX = 0.25
_STEPS = 16
_SAMPLED_SHARE = 16
_LAYER = 2
"""Quest attends its first two layers in full; this head is in the third."""


def add_diffuse(report: Report, keys: int) -> None:
    """Rows of error and cost of every method over `keys` keys, and the targets of the default."""
    head = Head(workload(keys, steps=_STEPS, prefill=keys))
    rows = {DEFAULT_DECODE: head.measure(DEFAULT_DECODE)}
    read = max(256, round(rows[DEFAULT_DECODE]["keys_read"]))
    others = [EXACT_TOP, *OTHER_BUDGETS, *baselines(read)]
    rows |= {name: head.measure(name) for name in others if name not in rows}
    for name, row in rows.items():
        report.add(suite=DIFFUSE, task=DIFFUSE, method=f"local/{name}", length=keys, **row)
    add_diffuse_targets(report, {name: row["output_error"] for name, row in rows.items()}, keys)


def add_diffuse_targets(report: Report, errors: dict[str, float], keys: int) -> None:
    """The default's output error against exact top-100's and every baseline's at equal keys read.

    errors: median relative error of the output by method.
    """
    own = errors[DEFAULT_DECODE]
    for name, error in errors.items():
        if name == DEFAULT_DECODE or name in OTHER_BUDGETS:
            continue
        note = f"{own:.4f} against {error:.4f}; {keys} keys, one synthetic head"
        share = round(own / error, 4) if error else float("inf")
        report.at_most(
            f"diffuse head: output error of {DEFAULT_DECODE} over {name}'s",
            SHARE_MAX, share, "ratio", note,
        )  # fmt: skip


def baselines(read: int) -> Sequence[str]:
    """Methods that read `read` keys of a KV head or more: those whose query heads choose apart give
    each head so many. An index of the papers' (IVF) keeps their budget and reads what it needs."""
    half = read // 2
    return (
        "ivf:top_k=100",
        f"streaming_llm:sink=128,window={read - 128}",
        f"dilated:sink=128,window={2 * (read - 128)},interval=1",
        f"static_top_k:top_k={read - 64},window=64",
        f"snapkv:capacity={read},window=32",
        f"quest:budget={read}",
        f"infllm:sink=64,window={half},block=32,blocks={max(1, (half - 64) // 32)}",
    )


class Head:
    """One synthetic KV head with its group of query heads, as methods see a layer."""

    def __init__(self, made: Workload) -> None:
        # fp32: in bfloat16 the rounding of outputs would hide small errors.
        keys, values = (to_tensor(rows)[None].float() for rows in (made.keys, made.values))
        group, tokens, dim = made.prefill_queries.shape[0], keys.shape[1], keys.shape[2]
        queries = torch.from_numpy(made.prefill_queries)
        mean = torch.zeros(1, tokens, dim)
        mean[0, torch.from_numpy(made.prefill_positions)] = queries.mean(0)
        some = slice(None, None, _SAMPLED_SHARE)
        record = QueryRecord(
            queries[:, -OBSERVED_QUERIES:],
            made.prefill_positions[some],
            np.ascontiguousarray(made.prefill_queries[:, some]),
            mean,
        )
        geometry = LayerGeometry(_LAYER, group, 1, dim, dim, 0)
        call = LayerCall(made.scale, 0.0)
        self._context = LayerContext(geometry, keys, values, record, call, keys[:, :0])
        self._queries = torch.from_numpy(made.decode_queries)
        self._truth, _ = self._attend("full")

    def measure(self, name: str) -> dict[str, Any]:
        """Median relative error of the output, and keys read and attended per query head's step."""
        output, work = self._attend(name)
        error = (output - self._truth).norm(dim=-1) / self._truth.norm(dim=-1)
        tokens, steps = self._context.tokens, self._queries.shape[1]
        return {
            "n": int(error.numel()),
            "output_error": round(float(error.median()), 5),
            "keys_read": round(work.keys_scanned / steps, 1),
            "scan_fraction": round(work.keys_scanned / (tokens * steps), 5),
            "sketch_fraction": round(work.keys_sketched / (tokens * steps), 5),
            "attended_fraction": round(work.keys_attended / (tokens * steps), 5),
            "bytes_fraction": round(work.bytes_fraction, 5),
        }

    def _attend(self, name: str) -> tuple[torch.Tensor, WorkFigures]:
        """Output [group, steps, dim] of decode steps that each see the context and themselves."""
        decoder = LayerDecoder(parse_decode(name), self._context)
        # The new token's own key is zero for all methods: a logit of 0 is far below the highest.
        new = torch.zeros_like(self._context.keys[:, :1])
        found = [
            decoder.attend(self._queries[:, step : step + 1], new, new)
            for step in range(self._queries.shape[1])
        ]
        output = torch.cat([each.partial.output for each in found], 1).float()
        return output, sum((each.work for each in found), WorkFigures())
