"""Linear layers in 16 bits on CPUs without instructions for them."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.linear import LEAST_ROWS, widen_products


@pytest.fixture(params=["AVX2", "DEFAULT"])
def slow_cpu(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)


def model(dtype, bias):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(48, 64, bias=bias), torch.nn.ReLU(), torch.nn.Linear(64, 8)]
    return torch.nn.Sequential(*layers).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, LEAST_ROWS - 1, LEAST_ROWS, 300])
def test_products_are_rounded_once_from_float32(slow_cpu, dtype, bias, rows):
    found = model(dtype, bias)
    x = torch.randn(2, rows, 48).to(dtype)
    first = found[0]
    exact = x.double() @ first.weight.double().T + (first.bias.double() if bias else 0)
    assert widen_products(found) == 2
    output = first(x)
    assert output.dtype == dtype
    half_step = torch.finfo(dtype).eps / 2
    error = (output.double() - exact).abs()
    assert (error <= 1.01 * half_step * exact.abs() + 1e-3 * half_step).float().mean() > 0.99
    assert found(x).shape == (2, rows, 8)


def test_many_rows_are_multiplied_in_float32_and_few_are_not(slow_cpu, monkeypatch):
    found = model(torch.bfloat16, True)
    widen_products(found)
    seen = []
    linear = torch.nn.functional.linear

    def spy(x, *rest):
        seen.append(x.dtype)
        return linear(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    found[0](torch.randn(LEAST_ROWS, 48).bfloat16())
    found[0](torch.randn(LEAST_ROWS - 1, 48).bfloat16())
    assert seen == [torch.float32, torch.bfloat16]


def test_float32_models_and_fast_cpus_are_left_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert widen_products(model(torch.float32, True)) == 0
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    found = model(torch.bfloat16, True)
    assert widen_products(found) == 0
    assert "forward" not in vars(found[0])
