"""Linear layers of 16-bit models on CPUs that have no instructions for 16-bit products.

Without AVX-512, torch multiplies bfloat16 and float16 matrices ten times slower than float32 ones
(15 against 150 GFLOP/s on an AMD EPYC with AVX2). Products of many rows are therefore made in
float32, from weights that are converted for each call: of 2,048 rows that is a thousandth of the
work, and the model stays as small as it is. Sums were float32 before too and the result is rounded
as before, so numbers change by the order of the sum only. Few rows, as in decode steps, are bound
by reading the weights and stay in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

LEAST_ROWS = 32
"""Rows from which on converting the weights pays, whatever their size."""


def cpu_multiplies_16_bits() -> bool:
    """Whether torch has fast 16-bit products on this machine's CPU."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def widen_products(module: torch.nn.Module) -> int:
    """Has the 16-bit linear layers of a model multiply many rows in float32; returns how many.

    Only plain `torch.nn.Linear` on a CPU; elsewhere nothing changes.
    """
    if cpu_multiplies_16_bits():
        return 0
    found = [
        layer
        for layer in module.modules()
        if type(layer) is torch.nn.Linear
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype in (torch.bfloat16, torch.float16)
    ]
    for layer in found:
        layer.forward = _widened(layer, layer.forward)
    return len(found)


def _widened(
    layer: torch.nn.Linear, narrow: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], Any]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.numel() < LEAST_ROWS * layer.in_features:
            return narrow(x)
        bias = None if layer.bias is None else layer.bias.float()
        return functional.linear(x.float(), layer.weight.float(), bias).to(x.dtype)

    return forward
