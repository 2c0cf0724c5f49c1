"""Sparsity, dynamics, distances and searches on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis

from evaluation.observations.dynamics import attention_of, recovered, step_rows
from evaluation.observations.heads import HeadGroup, synthetic_head
from evaluation.observations.mahalanobis import KeyDistribution, compare
from evaluation.observations.reporting import mean_over
from evaluation.observations.searches import (
    HnswSearcher,
    IvfSearcher,
    Point,
    RoarGraphSearcher,
    base_set,
    exact_best,
    recall,
    scanned_at,
)
from evaluation.observations.sparsity import rows_of, top_k_attention
from longreach.attention import attention_logits, softmax_partial

KS = (1, 3, 40, 200)


@pytest.fixture(scope="module")
def head() -> HeadGroup:
    return synthetic_head("synthetic:structured", 2048, steps=8, head_dim=32)


def test_top_k_attention_is_attention_over_the_k_best_keys() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 200)).astype(np.float32) * 4
    values = rng.standard_normal((200, 12)).astype(np.float32)
    found = top_k_attention(logits, values, KS)
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for i, k in enumerate(KS):
        threshold = np.sort(logits, axis=1)[:, -k][:, None]
        kept = softmax_partial(logits, values, logits >= threshold)
        np.testing.assert_allclose(found.outputs[:, i], kept.output, atol=1e-5)
        mass = np.where(logits >= threshold, weights, 0).sum(axis=1)
        np.testing.assert_allclose(found.mass[:, i], mass, rtol=1e-5)
    np.testing.assert_allclose(found.full, weights @ values, atol=1e-5)


def test_all_keys_hold_all_the_mass_and_leave_no_error(head: HeadGroup) -> None:
    rows = [row for row in rows_of(head, (16, 10**6)) if row["k"] == len(head.keys)]
    assert [row["q_head"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["mass"] == pytest.approx(1, abs=1e-5)
        assert row["relative_error"] < 1e-5


def test_more_keys_hold_more_mass_with_less_error(head: HeadGroup) -> None:
    means = mean_over(rows_of(head, (4, 64, 1024)), ("k",), ("mass", "relative_error"))
    assert means[0]["mass"] < means[1]["mass"] < means[2]["mass"]
    assert means[0]["relative_error"] > means[1]["relative_error"] > means[2]["relative_error"]


def test_a_static_choice_loses_nothing_where_attention_never_changes() -> None:
    weights = np.tile(np.array([0.5, 0.3, 0.1, 0.06, 0.04], np.float32), (4, 1))
    found = recovered(weights, weights[:2], 2)
    for rule in ("per_step", "previous_step", "static"):
        np.testing.assert_allclose(found[rule].mass, 0.8, rtol=1e-6)
        np.testing.assert_array_equal(found[rule].set_recall, 1)


def test_rules_differ_where_attention_moves() -> None:
    # The prompt looked at keys 0 and 1; the steps at 1 and 2, then at 2 and 3.
    before = np.array([[0.6, 0.4, 0, 0]], np.float32)
    weights = np.array([[0, 0.5, 0.4, 0.1], [0, 0.1, 0.2, 0.7]], np.float32)
    found = recovered(weights, before, 2)
    np.testing.assert_allclose(found["per_step"].mass, [0.9, 0.9])
    np.testing.assert_allclose(found["static"].mass, [0.5, 0.1])
    np.testing.assert_allclose(found["static"].set_recall, [0.5, 0])
    np.testing.assert_allclose(found["previous_step"].mass, [0.5, 0.3])
    np.testing.assert_allclose(found["previous_step"].set_recall, [0.5, 0.5])


def test_prompt_queries_attend_only_what_came_before_them(head: HeadGroup) -> None:
    position = int(head.prefill_positions[3])
    weights = attention_of(head, head.prefill_queries[0, 3:4], head.prefill_positions[3:4])
    assert not weights[0, position + 1 :].any()
    logits = attention_logits(
        head.prefill_queries[0, 3:4], head.keys[: position + 1], head.scale
    ).astype(np.float64)
    wanted = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose(weights[:, : position + 1], wanted, rtol=1e-3, atol=1e-7)


def test_keys_chosen_per_step_hold_more_than_keys_chosen_once(head: HeadGroup) -> None:
    """MInference's and RetrievalAttention's second observation, on a head of many topics."""
    rows = mean_over(step_rows(head, (64,), 16), ("rule",), ("mass", "set_recall"))
    found = {row["rule"]: row for row in rows}
    assert found["per_step"]["set_recall"] == 1
    assert found["static"]["set_recall"] < 0.5
    assert found["static"]["mass"] < 0.8 * found["per_step"]["mass"]


def test_distances_are_mahalanobis_distances() -> None:
    rng = np.random.default_rng(1)
    keys = (rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6)) + 3).astype(np.float32)
    points = rng.standard_normal((4, 6)).astype(np.float32)
    inverse = np.linalg.inv(np.cov(keys.T))
    wanted = [mahalanobis(point, keys.mean(axis=0), inverse) for point in points]
    np.testing.assert_allclose(KeyDistribution.of(keys).distances(points), wanted, rtol=1e-3)


def test_long_queries_are_far_but_not_at_equal_length() -> None:
    rng = np.random.default_rng(2)
    keys = rng.standard_normal((3000, 8)).astype(np.float32)
    found = compare(keys[:2000], keys[2000:2500], 10 * keys[2500:])
    assert found.ratio == pytest.approx(10, rel=0.05)
    assert found.ratio_at_equal_length == pytest.approx(1, rel=0.05)


def test_reading_every_cell_finds_every_key_and_reads_all(head: HeadGroup) -> None:
    base = base_set(head, 64)
    queries = head.decode_queries.reshape(-1, 32)
    truth = exact_best(base, queries, 10)
    searcher = IvfSearcher(base)
    ids, read = searcher.search(queries, 10, 1.0)
    assert recall(ids, truth) == 1
    centroids = len(base.centred) // 128
    assert read == len(queries) * (len(base.centred) + centroids)


@pytest.mark.parametrize("kind", [HnswSearcher, RoarGraphSearcher])
def test_a_wider_beam_reads_more_and_finds_more(
    kind: type[HnswSearcher] | type[RoarGraphSearcher],
) -> None:
    # A node reads shorter contexts whole.
    head = synthetic_head("synthetic:structured", 8192, steps=8, head_dim=32)
    base = base_set(head, 64)
    queries = np.ascontiguousarray(head.decode_queries.reshape(-1, 32))
    truth = exact_best(base, queries, 10)
    searcher = kind(base)
    narrow, few = searcher.search(queries, 10, 1.0)
    wide, many = searcher.search(queries, 10, 16.0)
    assert few < many <= len(queries) * len(base.centred)
    assert recall(narrow, truth) < recall(wide, truth)


def test_held_out_keys_are_not_among_those_searched(head: HeadGroup) -> None:
    base = base_set(head, 64)
    best = exact_best(base, base.held_out, 1)[:, 0]
    assert len(base.centred) == len(head.keys) - 64
    assert not (base.centred[best] == base.held_out).all(axis=1).any()


def test_the_share_read_at_a_recall_lies_between_the_efforts_around_it() -> None:
    points = [Point(1, 0.8, 0.1), Point(2, 0.9, 0.2), Point(3, 1.0, 0.6)]
    assert scanned_at(points, 0.95) == pytest.approx(0.4)
    assert scanned_at(points, 0.7) == pytest.approx(0.1)
    assert scanned_at(points[:2], 0.95) == 1
