"""The part that search-then-attend kinds share: budgets over found keys, and the tail's sample."""

from __future__ import annotations

import numpy as np
import pytest

from longreach.attention import softmax_partial
from longreach.types import Budget, Span
from retrieval_node.index.selection import (
    Found,
    Reads,
    Sample,
    attend_kept,
    distinct_keys,
    kept_counts,
    log_sum_exp,
    sampled_ids,
)

NOTHING = -np.inf


def counts(budget: Budget, logits: list[float], rest: float = NOTHING, floor: float | None = None):
    floors = None if floor is None else np.array([floor], np.float32)
    found = np.array([logits], np.float32)
    return int(kept_counts(found, budget, np.array([rest], np.float32), floors)[0])


def test_top_k_keeps_k_keys_or_all_that_were_found() -> None:
    assert counts(Budget(top_k=2), [3.0, 2.0, 1.0]) == 2
    assert counts(Budget(top_k=9), [3.0, 2.0, NOTHING]) == 2


def test_mass_keeps_the_fewest_keys_that_hold_it() -> None:
    logits = list(np.log([0.5, 0.3, 0.15, 0.05]))
    assert counts(Budget(mass=0.5), logits) == 1
    assert counts(Budget(mass=0.6), logits) == 2
    assert counts(Budget(mass=0.94), logits) == 3
    assert counts(Budget(mass=1.0), logits) == 4


def test_mass_counts_keys_that_no_search_found() -> None:
    assert counts(Budget(mass=0.5), [0.0, 0.0], rest=NOTHING) == 1
    assert counts(Budget(mass=0.5), [0.0, 0.0], rest=float(np.log(2.0))) == 2


def test_mass_obeys_its_floor_and_ceiling() -> None:
    logits = list(np.log([0.5, 0.3, 0.15, 0.05]))
    assert counts(Budget(mass=0.5, floor=3), logits) == 3
    assert counts(Budget(mass=0.99, ceiling=2), logits) == 2


def test_beta_keeps_keys_near_the_best() -> None:
    assert counts(Budget(beta=1.0), [5.0, 4.5, 4.0, 3.9]) == 3


def test_the_logit_floor_drops_keys_but_not_from_an_exact_budget() -> None:
    assert counts(Budget(top_k=3), [5.0, 4.0, 3.0], floor=3.5) == 2
    assert counts(Budget(top_k=3), [5.0, 4.0, 3.0], floor=6.0) == 0
    assert counts(Budget(exact=True), [5.0, 4.0, 3.0], floor=6.0) == 3


def test_a_sample_of_the_whole_scope_makes_the_tail_exact() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 50)).astype(np.float32)
    values = rng.standard_normal((80, 8)).astype(np.float32)
    scope = Span(20, 70)
    order = np.argsort(-logits, axis=1)[:, :7]
    found = Found(order + scope.start, np.take_along_axis(logits, order, 1), Reads(0, 0))
    sample = Sample(sampled_ids(scope), logits, len(scope))
    got = attend_kept(found, np.array([7, 3, 0]), values, sample)
    expected = softmax_partial(logits, values[20:70])
    np.testing.assert_allclose(got.output, expected.output, atol=1e-5)
    np.testing.assert_allclose(got.lse, expected.lse, atol=1e-5)


def test_unlisted_keys_share_the_rest_of_the_scope_equally() -> None:
    sample = Sample(np.array([0, 10, 20]), np.zeros((1, 3), np.float32), scope_keys=30)
    ids = np.array([[10, 11, 0]])
    listed = np.array([[True, True, False]])
    weights = np.exp(sample.unlisted(ids, listed))[0]
    np.testing.assert_allclose(weights, [14.0, 0.0, 14.0])


@pytest.mark.parametrize("length", [1, 5, 1024, 1025, 5000])
def test_sampled_rows_ascend_within_the_scope(length: int) -> None:
    ids = sampled_ids(Span(7, 7 + length))
    assert ids[0] == 7
    assert (np.diff(ids) > 0).all()
    assert ids[-1] < 7 + length
    assert len(ids) == min(length, 1024)


def test_a_key_of_two_query_heads_counts_once_for_their_row() -> None:
    ids = np.array([[1, 2], [2, 3], [2, 4], [2, 4]])
    assert distinct_keys(ids, np.array([2, 2, 1, 2]), group=2) == 3 + 2


def test_queries_that_keep_nothing_get_empty_attention() -> None:
    found = Found(np.array([[0, 1]]), np.zeros((1, 2), np.float32), Reads(0, 0))
    got = attend_kept(found, np.array([0]), np.ones((2, 4), np.float32))
    assert np.isneginf(got.lse).all()
    assert not got.output.any()
    assert np.isneginf(log_sum_exp(np.full((1, 3), -np.inf, np.float32))).all()
