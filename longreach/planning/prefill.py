"""FLOPs of a prefill and the time to the first token, dense and sparse.

The arithmetic of MInference's slides (arXiv 2407.02490): N x (2 x parameters + 2 x layers x N x
hidden + softmax), where 2 x layers x N x hidden is what causal attention takes (the scores and the
weighted sum are 2 FLOPs each per element of K and V, and half of all pairs are visible).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from longreach.planning.accelerators import (
    ATTENTION_UTILISATION,
    LINEAR_UTILISATION,
    SLIDES_SLOWDOWN,
    Accelerator,
)
from longreach.planning.shapes import ModelShape
from longreach.types import LayerGeometry

SOFTMAX_FLOPS = 5
"""Per score: maximum, difference, exponential, sum, division."""


@dataclass(frozen=True, slots=True)
class PrefillFlops:
    """FLOPs of one prompt: projections and feed-forward networks, attention, its softmax."""

    linear: float
    attention: float
    softmax: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.softmax


@dataclass(frozen=True, slots=True)
class PrefillEstimate:
    """A prefill on one accelerator, and how many give a wanted time to the first token.

    linear_s, attention_s: time at the utilisation that Table 1 of RetrievalAttention implies.
    at_peak_s: FLOPs over the data sheet's rate; slides_s: that times 1.5, as MInference's slides
    have it. `accelerators` is ceil(slides_s / target) for a target, else 0: compute to buy, if it
    could be spread without loss; a worker prefills a prompt on one device.
    """

    density: float
    flops: PrefillFlops
    linear_s: float
    attention_s: float
    at_peak_s: float
    slides_s: float
    accelerators: int

    @property
    def total_s(self) -> float:
        """Time to the first token on one accelerator."""
        return self.linear_s + self.attention_s


def visible_pairs(tokens: int, layer: LayerGeometry) -> int:
    """(query, key) pairs of a causal layer, counted as N^2 / 2 like the slides do."""
    window = layer.sliding_window
    if not window or window >= tokens:
        return tokens * tokens // 2
    return window * window // 2 + (tokens - window) * window


def prefill_flops(shape: ModelShape, tokens: int, density: float = 1.0) -> PrefillFlops:
    """FLOPs of `tokens`; `density` is the share of visible pairs that full-attention layers
    compute. Sliding layers are computed whole."""
    attention = softmax = 0.0
    for layer in shape.layers:
        share = 1.0 if layer.sliding_window else density
        pairs = visible_pairs(tokens, layer) * share * layer.q_heads
        attention += 2 * (layer.head_dim + layer.value_dim) * pairs
        softmax += SOFTMAX_FLOPS * pairs
    return PrefillFlops(2.0 * tokens * shape.parameters, attention, softmax)


def estimate_prefill(
    shape: ModelShape,
    tokens: int,
    accelerator: Accelerator,
    density: float = 1.0,
    ttft_target_s: float = 0.0,
) -> PrefillEstimate:
    """Time of a prefill at a density, see PrefillEstimate."""
    flops = prefill_flops(shape, tokens, density)
    slides_s = SLIDES_SLOWDOWN * flops.total / accelerator.flops
    return PrefillEstimate(
        density=density,
        flops=flops,
        linear_s=flops.linear / (LINEAR_UTILISATION * accelerator.flops),
        attention_s=flops.attention / (ATTENTION_UTILISATION * accelerator.flops),
        at_peak_s=flops.total / accelerator.flops,
        slides_s=slides_s,
        accelerators=math.ceil(slides_s / ttft_target_s) if ttft_target_s > 0 else 0,
    )
