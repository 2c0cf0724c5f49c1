"""Sparse attention patterns for prefill. Importing this package registers all patterns."""

from gpu_worker.patterns import (
    a_shape,
    adaptive,
    block_sparse,
    dense,
    dilated,
    per_head,
    strided,
    top_k,
    vertical_slash,
)
from gpu_worker.patterns.base import PATTERNS, Pattern, PatternResult, Selection, attend_chunk

__all__ = [
    "PATTERNS",
    "Pattern",
    "PatternResult",
    "Selection",
    "a_shape",
    "adaptive",
    "attend_chunk",
    "block_sparse",
    "dense",
    "dilated",
    "per_head",
    "strided",
    "top_k",
    "vertical_slash",
]
