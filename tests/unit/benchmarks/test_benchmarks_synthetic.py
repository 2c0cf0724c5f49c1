"""Synthetic heads have the statistics that make retrieval over real heads hard."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.retrieval_methods import RECALLS, cheapest
from benchmarks.scene import Quality
from benchmarks.synthetic import Workload, rotate, workload


def mahalanobis(rows: np.ndarray, keys: np.ndarray) -> float:
    centred = keys - keys.mean(axis=0)
    inverse = np.linalg.pinv(centred.T @ centred / len(keys))
    away = rows - keys.mean(axis=0)
    return float(np.sqrt(np.einsum("ij,jk,ik->i", away, inverse, away)).mean())


def head(name: str, mass: float = 0.9) -> Workload:
    return workload(4096, name=name, head_dim=64, group=2, steps=32, prefill=256, mass=mass)


def test_the_same_seed_gives_the_same_head() -> None:
    one, two = head("structured"), head("structured")
    np.testing.assert_array_equal(one.keys, two.keys)
    np.testing.assert_array_equal(one.decode_queries, two.decode_queries)


def test_queries_lie_far_outside_the_keys_distribution() -> None:
    made = head("structured")
    keys = np.asarray(made.keys, np.float64)
    queries = made.decode_queries.reshape(-1, 64).astype(np.float64)
    assert mahalanobis(queries, keys) > 3 * mahalanobis(keys[::16], keys)


def test_the_hard_head_has_the_flatter_spectrum() -> None:
    effective = {}
    for name in ("structured", "hard"):
        spectrum = np.linalg.eigvalsh(np.cov(np.asarray(head(name).keys, np.float64).T))
        effective[name] = spectrum.sum() ** 2 / (spectrum**2).sum()
    assert effective["hard"] > 1.5 * effective["structured"]


@pytest.mark.parametrize("mass", [0.7, 0.9])
def test_the_best_keys_hold_about_the_mass_asked_for(mass: float) -> None:
    made = head("structured", mass)
    logits = made.decode_queries[1] @ np.asarray(made.keys, np.float32).T * made.scale
    weights = np.sort(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)[:, ::-1]
    share = weights[:, : 4096 // 32].sum(axis=1) / weights.sum(axis=1)
    assert np.median(share) == pytest.approx(mass, abs=0.06)


def test_rotation_keeps_lengths_and_relative_positions() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 32)).astype(np.float32)
    y = rng.standard_normal((3, 32)).astype(np.float32)
    near = (rotate(x, np.full(3, 5)) * rotate(y, np.full(3, 9))).sum(axis=1)
    far = (rotate(x, np.full(3, 105)) * rotate(y, np.full(3, 109))).sum(axis=1)
    np.testing.assert_allclose(near, far, atol=1e-4)


def test_each_recall_is_timed_at_the_first_setting_that_reaches_it() -> None:
    recall = {1: 0.5, 2: 0.92, 3: 0.93, 4: 0.98, 5: 0.995, 6: 1.0}
    chosen = cheapest(list(recall), lambda setting: Quality(recall[setting], 0, 0, 0))
    assert [setting for setting, _ in chosen] == [2, 4, 5]
    assert RECALLS == (0.90, 0.95, 0.97, 0.99)


def test_a_method_that_reaches_no_recall_is_timed_at_its_widest() -> None:
    chosen = cheapest([1, 2], lambda setting: Quality(0.1 * setting, 0, 0, 0))
    assert [setting for setting, _ in chosen] == [2]
