"""Sampling is a pure function of (seed, position, logits)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_models import VOCAB

from gpu_worker.philox import philox4x32, uniform
from gpu_worker.sampling import Drawn, check_sampling, sample
from longreach.errors import InvalidRequest
from longreach.types import SamplingParams

LOGITS = 2 * torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0))


def draw(logits: torch.Tensor, params: SamplingParams, position: int, top: int = 0) -> Drawn:
    return sample(logits[None], [params], [position], [top])[0]


# Known answers of Philox 4x32-10 from Random123, the authors' library (kat_vectors).
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_generator_gives_the_published_answers(
    counter: list[int], key: list[int], words: list[int]
) -> None:
    got = philox4x32(np.array([counter], np.uint64), np.array([key], np.uint64))
    assert got[0].tolist() == words


def test_uniform_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    many = np.arange(20000, dtype=np.uint64)
    for seeds, positions in [(many, many * 0 + 7), (many * 0 + 7, many)]:
        numbers = np.sort(uniform(seeds.astype(np.uint64), positions.astype(np.uint64)))
        assert numbers[0] > 0
        assert numbers[-1] < 1
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed with probability 0.999.
        assert np.abs(numbers - (np.arange(20000) + 0.5) / 20000).max() < 1.95 / np.sqrt(20000)


def test_seeds_and_positions_use_all_their_bits() -> None:
    words = [0, 1, 1 << 31, 1 << 32, 1 << 40, (1 << 63) + 5]
    pairs = np.array([(a, b) for a in words for b in words], np.uint64)
    assert len(set(uniform(pairs[:, 0], pairs[:, 1]).tolist())) == len(pairs)


def test_temperature_zero_is_greedy() -> None:
    assert draw(LOGITS[0], SamplingParams(), 5).token_id == int(LOGITS[0].argmax())


@settings(max_examples=40, deadline=None)
@given(
    order=st.permutations(range(6)),
    size=st.integers(1, 6),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**40),
)
def test_a_row_draws_the_same_token_in_any_batch(
    order: list[int], size: int, seed: int, position: int
) -> None:
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.7, seed=seed),
        SamplingParams(temperature=1.3, top_k=5, seed=seed),
        SamplingParams(temperature=1.0, top_p=0.6, seed=seed),
        SamplingParams(temperature=2.0, top_p=0.9, top_k=40, seed=seed),
        SamplingParams(temperature=1.0, seed=seed + 1 if seed < 2**64 - 1 else 0),
    ]
    alone = [draw(LOGITS[i], kinds[i], position + i).token_id for i in range(6)]
    rows = order[:size]
    batch = sample(LOGITS[rows], [kinds[i] for i in rows], [position + i for i in rows], [0] * size)
    assert [each.token_id for each in batch] == [alone[i] for i in rows]


def test_draws_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    count = 20000
    params = [SamplingParams(temperature=0.8, seed=3)] * count
    drawn = sample(logits.expand(count, -1), params, range(count), [0] * count)
    observed = np.bincount([each.token_id for each in drawn], minlength=5) / count
    expected = torch.softmax(logits / 0.8, -1).numpy()
    np.testing.assert_allclose(observed, expected, atol=4 * np.sqrt(0.25 / count))


def test_top_k_and_top_p_keep_the_most_likely_tokens_only() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = probabilities.log()

    def support(**params: float) -> set[int]:
        kind = SamplingParams(temperature=1.0, seed=1, **params)  # type: ignore[arg-type]
        drawn = sample(logits.expand(400, -1), [kind] * 400, range(400), [0] * 400)
        return {each.token_id for each in drawn}

    assert support() == {0, 1, 2, 3}
    assert support(top_k=2) == {0, 1}
    assert support(top_p=0.5) == {0, 1}
    assert support(top_p=0.05) == {0}
    assert support(top_p=0.95, top_k=3) == {0, 1, 2}
    assert support(top_p=1.0) == {0, 1, 2, 3}


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    token = draw(LOGITS[1], SamplingParams(temperature=1e-30, seed=9), 5).token_id
    assert token == int(LOGITS[1].argmax())


def test_log_probabilities_ignore_temperature_and_filters() -> None:
    params = SamplingParams(temperature=3.0, top_k=3, seed=5)
    got = draw(LOGITS[2], params, 8, top=4)
    logprobs = torch.log_softmax(LOGITS[2], -1)
    assert got.logprob == pytest.approx(float(logprobs[got.token_id]), abs=1e-5)
    best = torch.topk(logprobs, 4)
    assert got.top_logprobs == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def test_each_row_gets_as_many_alternatives_as_it_asked_for() -> None:
    drawn = sample(LOGITS[:3], [SamplingParams()] * 3, [1, 2, 3], [0, 2, 5])
    assert [len(each.top_logprobs) for each in drawn] == [0, 2, 5]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=-1),
        SamplingParams(temperature=float("nan")),
        SamplingParams(temperature=float("inf")),
        SamplingParams(temperature=1, top_p=1.5),
        SamplingParams(temperature=1, top_k=-1),
    ],
)
def test_parameters_out_of_range_are_refused(params: SamplingParams) -> None:
    with pytest.raises(InvalidRequest):
        check_sampling(params)
