"""The torch twin of partial attention is held to the NumPy specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from worker_models import random_model

from gpu_worker import attention as twin
from gpu_worker.attention import (
    Partial,
    apply_sinks,
    bias_of,
    blockwise_attention,
    causal_attention,
    dense_attention,
    merge,
    registered_attention,
)
from longreach import attention as spec
from longreach.errors import Internal
from longreach.types import PartialAttention


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def assert_same(got: Partial, want: PartialAttention, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(got.lse.numpy(), want.lse, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(got.output.numpy(), want.output, atol=tolerance, rtol=tolerance)


def specified(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: np.ndarray, scale: float, cap: float
) -> PartialAttention:
    """The specification for q [q_heads, rows, d]: output [q_heads, rows, dv]."""
    queries, keys, values = (x.float().numpy() for x in (q.transpose(0, 1), k, v))
    part = spec.partial_attention(queries, keys, values, scale, cap, keep[:, None])
    return PartialAttention(np.moveaxis(part.output, 0, 1), np.moveaxis(part.lse, 0, 1))


@pytest.mark.parametrize("sliding_window", [0, 1, 30, 1000])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (0, 300), (37, 20), (290, 300)])
def test_causal_attention_is_the_specification_under_a_causal_mask(
    start: int, rows: int, softcap: float, sliding_window: int
) -> None:
    stop = start + rows
    q, k, v = tensors((6, rows, 16), (2, stop, 16), (2, stop, 16))
    at, held = np.arange(start, stop)[:, None], np.arange(stop)[None]
    keep = held <= at
    if sliding_window:
        keep &= held > at - sliding_window
    got = causal_attention(q, k, v, start, 0.3, softcap, sliding_window)
    assert_same(got, specified(q, k, v, keep, 0.3, softcap))


def test_causal_attention_takes_values_of_another_width_than_keys() -> None:
    q, k, v = tensors((4, 50, 24), (2, 90, 24), (2, 90, 8))
    keep = np.arange(90)[None] <= np.arange(40, 90)[:, None]
    got = causal_attention(q, k, v, 40, 0.2)
    assert_same(got, specified(q, k, v, keep, 0.2, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_are_attended_within_their_own_rounding(dtype: torch.dtype) -> None:
    q, k, v = tensors((4, 200, 32), (2, 400, 32), (2, 400, 32), dtype=dtype)
    keep = np.arange(400)[None] <= np.arange(200, 400)[:, None]
    got = causal_attention(q, k, v, 200, 32**-0.5)
    assert got.output.dtype is got.lse.dtype is torch.float32
    assert_same(got, specified(q, k, v, keep, 32**-0.5, 0.0), tolerance=2e-2)


@pytest.mark.parametrize("attend", [dense_attention, blockwise_attention])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_masked_attention_is_the_specification(attend: object, softcap: float) -> None:
    q, k, v = tensors((3, 2, 5, 16), (3, 2, 70, 16), (3, 2, 70, 16))
    keep = torch.rand(3, 1, 5, 70, generator=torch.Generator().manual_seed(0)) < 0.3
    keep[..., 0] = True
    got = attend(q, k, v, 0.4, softcap, bias_of(keep))  # type: ignore[operator]
    logits = spec.attention_logits(q.numpy(), k.numpy(), 0.4, softcap)
    assert_same(got, spec.softmax_partial(logits, v.numpy(), keep.numpy()))


def test_blockwise_attention_spans_many_key_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twin, "_KEY_BLOCK", 16)
    q, k, v = tensors((1, 1, 4, 8), (1, 1, 100, 8), (1, 1, 100, 8))
    logits = spec.attention_logits(q.numpy(), k.numpy(), 1.0)
    assert_same(blockwise_attention(q, k, v, 1.0), spec.softmax_partial(logits, v.numpy()))


def test_rows_that_keep_no_key_have_no_mass() -> None:
    q, k, v = tensors((1, 1, 2, 8), (1, 1, 9, 8), (1, 1, 9, 8))
    keep = torch.tensor([[True] * 9, [False] * 9])[None, None]
    got = blockwise_attention(q, k, v, 1.0, bias=bias_of(keep))
    assert got.lse[0, 0, 1] == -torch.inf
    assert torch.equal(got.output[0, 0, 1], torch.zeros(8))


def test_merge_is_the_specification_even_where_a_part_saw_nothing() -> None:
    generator = np.random.default_rng(0)
    parts = [
        PartialAttention(
            generator.normal(size=(4, 3, 8)).astype(np.float32),
            generator.normal(size=(4, 3)).astype(np.float32),
        )
        for _ in range(2)
    ]
    parts[0].lse[0] = parts[1].lse[1] = -np.inf
    parts[0].lse[2] = parts[1].lse[2] = -np.inf
    parts[0].output[[0, 2]] = parts[1].output[[1, 2]] = 0
    got = merge(*(Partial(*map(torch.from_numpy, (p.output, p.lse))) for p in parts))
    assert_same(got, spec.merge(parts))


def test_a_sink_takes_its_share_of_the_mass_and_gives_nothing() -> None:
    q, k, v = tensors((2, 1, 8), (2, 9, 8), (2, 9, 8))
    sinks = torch.tensor([0.7, -1.0])
    part = causal_attention(q, k, v, 8, 1.0)
    rows_first = Partial(part.output.transpose(0, 1), part.lse.transpose(0, 1))
    logits = torch.cat([(q @ k.transpose(1, 2))[:, 0], sinks[:, None]], 1)
    want = (torch.softmax(logits, -1)[:, None, :-1] @ v)[:, 0]
    torch.testing.assert_close(apply_sinks(rows_first, sinks)[0], want, atol=1e-5, rtol=1e-5)


def test_without_the_flash_operator_the_same_answers_come(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors((4, 60, 16), (2, 100, 16), (2, 100, 16))
    fast = causal_attention(q, k, v, 40, 0.3)
    monkeypatch.setattr(twin, "_flash_works", lambda device: False)
    plain = causal_attention(q, k, v, 40, 0.3)
    torch.testing.assert_close(plain.output, fast.output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain.lse, fast.lse, atol=1e-5, rtol=1e-5)


def test_keys_that_no_cache_returned_are_refused() -> None:
    module = random_model("llama").module
    q, k, v = tensors((1, 4, 3, 16), (1, 2, 3, 16), (1, 2, 3, 16))
    with pytest.raises(Internal, match="changed the keys"):
        registered_attention(module, q, k, v, None)


def test_a_flash_operator_that_changed_its_meaning_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flash = twin._flash

    def changed(*args: object, **kwargs: object) -> Partial:
        part = flash(*args, **kwargs)  # type: ignore[arg-type]
        return Partial(part.output, part.lse / np.log(2))

    assert twin._flash_works.__wrapped__("cpu")
    monkeypatch.setattr(twin, "_flash", changed)
    assert not twin._flash_works.__wrapped__("cpu")
    assert "disagrees" in caplog.text
