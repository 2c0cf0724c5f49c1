"""What accelerators can do, from their data sheets, and how much of it attention really gets."""

from __future__ import annotations

from dataclasses import dataclass

from longreach.errors import InvalidRequest

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Accelerator:
    """Dense 16-bit matrix FLOP/s, memory bytes and bytes/s, of one device (data sheet)."""

    name: str
    flops: float
    memory_bytes: int
    memory_bytes_s: float


_LIST = (
    Accelerator("a100-40g", 312e12, 40 * GIB, 1.555e12),
    Accelerator("a100-80g", 312e12, 80 * GIB, 2.039e12),
    Accelerator("h100-80g", 989e12, 80 * GIB, 3.35e12),
    Accelerator("h200-141g", 989e12, 141 * 10**9, 4.8e12),
    Accelerator("l4-24g", 121e12, 24 * GIB, 0.3e12),
    Accelerator("rtx4090-24g", 165e12, 24 * GIB, 1.008e12),
)
ACCELERATORS = {each.name: each for each in _LIST}

LINEAR_UTILISATION = 0.86
ATTENTION_UTILISATION = 0.53
"""Shares of an A100's peak that projections with feed-forward networks, and attention, reach: the
medians over the four lengths of RetrievalAttention's Table 1 (arXiv 2409.10516) of the FLOPs
counted here over 312 TFLOP/s and the published time. Taken for every accelerator."""

SLIDES_SLOWDOWN = 1.5
"""MInference's slides multiply the time at peak by this (14.52 to 21.78 minutes)."""


def find_accelerator(name: str) -> Accelerator:
    """The accelerator of that name. Raises InvalidRequest."""
    try:
        return ACCELERATORS[name]
    except KeyError:
        raise InvalidRequest(
            f"no accelerator {name!r} is known; known: {', '.join(ACCELERATORS)}"
        ) from None
