"""Sampled answers are compared with exact attention, rightly and without holding up anyone."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from node_harness import EXACT, SCALE, Clock, Sequence, open_session, put, rows_for

from longreach.attention import attention_logits, partial_attention
from longreach.errors import InvalidRequest
from longreach.telemetry.instruments import collect, switch_off, switch_on
from longreach.types import AttendResult, Budget, Span
from retrieval_node.builds import Builder
from retrieval_node.config import NodeConfig
from retrieval_node.index.base import (
    INDEX_KINDS,
    BuildControl,
    Index,
    IndexAnswer,
    IndexRows,
    LayerKv,
)
from retrieval_node.index.flat import FlatIndex
from retrieval_node.memory import MemoryBudget
from retrieval_node.quality import Quality, QualitySampler, sampler_with_metrics
from retrieval_node.store import Store

TOP = Budget(top_k=10)
CONTEXT, STORED, TOKENS = 150, 260, 300
"""The session's context, what two shards hold, and where its tail ends."""


class Forgetful(FlatIndex):
    """Loses every key at an odd position: what a broken index looks like."""

    kind: ClassVar[str] = "forgetful"

    def __init__(self, kv: LayerKv) -> None:
        super().__init__(kv)
        self._even = FlatIndex(replace(kv, keys=kv.keys[:, ::2], values=kv.values[:, ::2], start=0))
        self._start = kv.start

    @classmethod
    def build(cls, kv: LayerKv, sample: object, control: BuildControl) -> Index:
        return cls(kv)

    def attend(
        self, batch: list[IndexRows], scale: float, softcap: float = 0.0, *, want_selected=False
    ) -> list[IndexAnswer]:
        assert self._start % 2 == 0
        halves = [
            rows._replace(
                scope=Span(
                    max(0, -(-(rows.scope.start - self._start) // 2)),
                    max(0, -(-(rows.scope.stop - self._start) // 2)),
                ),
            )
            for rows in batch
        ]
        answers = self._even.attend(halves, scale, softcap, want_selected=want_selected)
        if not want_selected:
            return answers
        return [
            each._replace(
                selected=[
                    [[2 * ids + self._start for ids in group] for group in row]
                    for row in each.selected
                ],
            )
            for each in answers
        ]


def store_with(sampler: QualitySampler) -> Store:
    memory = MemoryBudget(64 << 20)
    return Store(
        secret=b"a secret of the tests",
        memory=memory,
        builder=Builder(memory, "flat", 1),
        quality=sampler,
        clock=Clock(),
    )


def serve(store: Store, sequence: Sequence) -> int:
    """Two shards and a tail; returns the session's handle."""
    put(store, sequence, sequence.shard(0, CONTEXT - 50))
    put(store, sequence, sequence.shard(CONTEXT - 50, STORED))
    handle, _ = open_session(store, sequence, CONTEXT)
    store.append(sequence.entry(handle, CONTEXT, TOKENS))
    return handle


@pytest.fixture
def measured():
    """A sampler of every message, without a limit of its own, and what it reports."""
    reports: queue.Queue[Quality] = queue.Queue()
    sampler = QualitySampler(1.0, reports.put, lambda: None, cpu_share=1.0)
    yield sampler, reports
    sampler.close()


def ask(store: Store, handle: int, reports: queue.Queue[Quality], **changes: object):
    rows = rows_for(handle, Span(3, TOKENS), budget=TOP, **changes)
    [result] = store.attend(0, [rows], SCALE, 0.0).results
    assert isinstance(result, AttendResult)
    return rows, result, reports.get(timeout=30)


def error_of(output: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(output - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


def test_exact_search_has_full_recall_and_the_mass_of_what_it_kept(measured):
    sampler, reports = measured
    sequence, store = Sequence(TOKENS), store_with(sampler)
    handle = serve(store, sequence)
    seen = set()
    for seed in range(12):
        rows, result, found = ask(store, handle, reports, rows=2, seed=seed)
        assert found.index_kind == "flat"
        np.testing.assert_array_equal(found.recall, 1.0)
        exact = sequence.reference(0, rows.queries, rows.scope)
        errors = error_of(result.partial.output[-1], exact.output[-1])
        # Which KV head was drawn is the sampler's own choice.
        [head] = [
            h for h in (0, 1) if np.allclose(found.output_error, errors[2 * h : 2 * h + 2], 1e-3)
        ]
        seen.add(head)
        # Each shard keeps its 10 best, the tail everything.
        for number, mass in enumerate(found.mass):
            logits = attention_logits(
                rows.queries[-1, 2 * head + number], sequence.keys[0][head], SCALE
            )
            weights = np.exp(logits - exact.lse[-1, 2 * head + number])
            kept = weights[CONTEXT:].sum()
            for start, stop in ((3, CONTEXT - 50), (CONTEXT - 50, CONTEXT)):
                kept += np.sort(weights[start:stop])[-10:].sum()
            assert mass == pytest.approx(kept, rel=1e-4)
    assert seen == {0, 1}


def test_keys_that_an_index_loses_show_as_recall_mass_and_error(measured, monkeypatch):
    monkeypatch.setitem(INDEX_KINDS._entries, "flat", Forgetful)
    sampler, reports = measured
    sequence, store = Sequence(TOKENS), store_with(sampler)
    put(store, sequence, sequence.shard(0, STORED))
    handle, _ = open_session(store, sequence, STORED)
    recalls = []
    for seed in range(20):
        rows, _, found = ask(store, handle, reports, seed=seed)
        assert found.index_kind == "forgetful"
        even = {
            head: np.argsort(
                -attention_logits(
                    rows.queries[0, 2 * head : 2 * head + 2],
                    sequence.keys[0][head, 3:STORED],
                    SCALE,
                ),
                axis=1,
            )[:, :10]
            for head in (0, 1)
        }
        expected = [((best + 3) % 2 == 0).mean(axis=1) for best in even.values()]
        assert any(np.allclose(found.recall, each) for each in expected)
        assert (found.mass < 1).all()
        assert (found.output_error > 0.01).all()
        recalls.append(found.recall.mean())
    assert 0.3 < np.mean(recalls) < 0.7


def test_what_is_exact_anyway_is_not_sampled(measured):
    sampler, reports = measured
    sequence, store = Sequence(TOKENS), store_with(sampler)
    handle = serve(store, sequence)
    exact = rows_for(handle, Span(0, TOKENS), budget=EXACT)
    tail_only = rows_for(handle, Span(CONTEXT, TOKENS), budget=TOP)
    store.attend(0, [exact, tail_only], SCALE, 0.0)
    _, _, found = ask(store, handle, reports)
    assert found.index_kind == "flat"
    assert reports.empty()


def test_a_budget_without_a_number_is_measured_on_the_hundred_best(measured):
    sampler, reports = measured
    sequence, store = Sequence(TOKENS), store_with(sampler)
    handle = serve(store, sequence)
    rows = rows_for(handle, Span(0, CONTEXT), budget=Budget(beta=0.0))
    store.attend(0, [rows], SCALE, 0.0)
    # Of each shard the best key alone is kept: two of a hundred at the most.
    np.testing.assert_array_less(reports.get(timeout=30).recall, 0.021)


def test_samples_that_come_while_one_is_measured_or_too_often_are_dropped():
    sequence, dropped = Sequence(TOKENS), []
    entered, leave = threading.Event(), threading.Event()
    reports: list[Quality] = []

    def report(found: Quality) -> None:
        reports.append(found)
        entered.set()
        leave.wait(30)

    # With so small a share of the CPU, nothing is measured after the first.
    sampler = QualitySampler(1.0, report, lambda: dropped.append(1), cpu_share=1e-9)
    store = store_with(sampler)
    handle = serve(store, sequence)
    rows = rows_for(handle, Span(0, TOKENS), budget=TOP)
    store.attend(0, [rows], SCALE, 0.0)
    assert entered.wait(30)
    for _ in range(3):  # the token path goes on while the first is held up
        store.attend(0, [rows], SCALE, 0.0)
    assert len(dropped) == 3
    leave.set()
    store.close()
    assert len(reports) == 1


def test_nothing_is_sampled_at_share_zero():
    def unexpected(*_: object) -> None:
        raise AssertionError("nothing was to be sampled")

    sampler = QualitySampler(0.0, unexpected, unexpected)
    assert all(sampler.draw() is None for _ in range(1000))
    sampler.close()


def test_a_sixteen_bit_shard_is_compared_with_attention_over_the_same_bits(measured):
    sampler, reports = measured
    sequence, store = Sequence(TOKENS, dtype="bfloat16"), store_with(sampler)
    put(store, sequence, sequence.shard(0, STORED))
    handle, _ = open_session(store, sequence, STORED)
    rows, result, found = ask(store, handle, reports)
    exact = partial_attention(
        rows.queries,
        sequence.keys[0][:, 3:STORED].astype(np.float32),
        sequence.values[0][:, 3:STORED].astype(np.float32),
        SCALE,
    )
    errors = error_of(result.partial.output[0], exact.output[0])
    assert any(np.allclose(found.output_error, errors[h : h + 2], 1e-3) for h in (0, 2))


def test_measurements_become_metrics_one_observation_for_each_query_head():
    switch_on("node", {"engine": "node-0"})
    try:
        sampler = sampler_with_metrics(1.0)
        sequence, store = Sequence(TOKENS), store_with(sampler)
        handle = serve(store, sequence)
        store.attend(0, [rows_for(handle, Span(0, TOKENS), budget=TOP)], SCALE, 0.0)
        store.close()  # what was drawn is measured first
        found = {each.metric.name: each.series for each in collect()}
    finally:
        switch_off()
    labels = {"engine": "node-0", "index_kind": "flat"}
    for name in ("recall", "mass", "output_error"):
        [(at, distribution)] = found[f"retrieval_{name}_sampled"]
        assert at == labels
        assert sum(distribution.counts) == 2  # the group of a KV head
    assert {at["result"]: n for at, n in found["retrieval_quality_samples"]} == {
        "done": 1,
        "dropped": 0,
    }


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InvalidRequest, match=f"quality_sample_share is {share}"):
        NodeConfig(cluster_secret="s", quality_sample_share=share)


def test_nothing_is_sampled_where_nobody_would_see_it():
    assert not NodeConfig(cluster_secret="s").samples_quality
    assert NodeConfig(cluster_secret="s", metrics_listen="127.0.0.1:0").samples_quality
    assert not NodeConfig(
        cluster_secret="s", metrics_listen="127.0.0.1:0", quality_sample_share=0.0
    ).samples_quality
