"""Table 1 of RetrievalAttention (arXiv 2409.10516) for any model: full attention's cost of a token.

Without a KV cache a token costs a whole forward pass over the prompt. The published table counts
prompts in thousands (1M is 1,024,000 tokens) and KV in GiB: 32 layers x 8 heads x 2 x 128 x 2 bytes
x 128,000 tokens are 15.6 of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from longreach.planning.accelerators import GIB, Accelerator
from longreach.planning.prefill import estimate_prefill
from longreach.planning.shapes import ModelShape

PROMPTS = (128_000, 256_000, 512_000, 1_024_000)


@dataclass(frozen=True, slots=True)
class Table1Column:
    """One prompt length: seconds without a KV cache, and GiB of KV with one."""

    tokens: int
    total_s: float
    ffn_s: float
    attention_s: float
    kv_cache_gib: float


PUBLISHED = (
    Table1Column(128_000, 32.8, 7.6, 25.2, 15.6),
    Table1Column(256_000, 111, 15, 96, 31.2),
    Table1Column(512_000, 465, 31, 434, 62.5),
    Table1Column(1_024_000, 1765, 70, 1695, 125),
)
"""As printed: Llama-3-8B on one A100."""


def table1(shape: ModelShape, accelerator: Accelerator) -> tuple[Table1Column, ...]:
    """The table's columns for a model on an accelerator."""
    columns = []
    for tokens in PROMPTS:
        cost = estimate_prefill(shape, tokens, accelerator)
        kv_gib = tokens * shape.token_bytes / GIB
        columns.append(Table1Column(tokens, cost.total_s, cost.linear_s, cost.attention_s, kv_gib))
    return tuple(columns)
