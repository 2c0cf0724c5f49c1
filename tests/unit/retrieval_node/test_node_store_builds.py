"""Indexes built in the background: swapped in when done, given up without harm."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from node_harness import (
    SCALE,
    SECRET,
    Sequence,
    make_store,
    open_session,
    rows_for,
    write_capability,
)

from longreach.errors import Cancelled, InvalidRequest
from longreach.types import AttendResult, IndexStatus, QuerySample, Span
from retrieval_node.builds import Builder
from retrieval_node.index.base import INDEX_KINDS, Index
from retrieval_node.memory import MemoryBudget
from retrieval_node.snapshot import Snapshots
from retrieval_node.store import Store

FLAT = INDEX_KINDS["flat"]


class Gate:
    """Where a build under test stands; the test lets it go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.cancelled = threading.Event()
        self.samples: dict[int, QuerySample | None] = {}
        self.niceness: list[int] = []
        self.fails = False
        self.heeds_cancel = True
        self.nbytes = 1000


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Registers the kind `gated`, whose builds wait at the gate and answer as flat does."""
    made = Gate()

    class Gated(FLAT):  # type: ignore[misc, valid-type]
        kind = "gated"
        needs_build = True

        @classmethod
        def build(cls, kv, sample, control) -> Index:
            made.niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            made.samples[len(made.samples)] = sample
            made.entered.set()
            control.progress(1, kv.kv_heads)
            while not made.go_on.wait(0.01):
                if control.cancelled.is_set() and made.heeds_cancel:
                    made.cancelled.set()
                    raise Cancelled("dropped")
            if made.fails:
                raise ArithmeticError("no such luck")
            return cls(kv)

        @property
        def index_bytes(self) -> int:
            return made.nbytes

    monkeypatch.setitem(INDEX_KINDS._entries, "gated", Gated)
    yield made
    made.go_on.set()


def arrays_of(store: Store, context_id: str) -> list[weakref.ref]:
    """Weak references to the keys of both layers of a context's only shard."""
    (served,) = store._contexts.get(context_id).served.values()
    return [weakref.ref(kv.keys) for kv in served.sealed.layers.values()]


def gated_store(snapshots: Snapshots | None = None) -> tuple[Store, Builder]:
    memory = MemoryBudget(1 << 20)
    builder = Builder(memory, "gated", 1)
    return Store(secret=SECRET, memory=memory, builder=builder, snapshots=snapshots), builder


def put_with_sample(store: Store, sequence: Sequence) -> None:
    capability = write_capability(sequence.context_id)
    shard = sequence.shard()
    sample = QuerySample(0, 0, np.arange(4), np.ones((4, 4, 8), np.float32))
    with store.put(
        sequence.context_id, shard, sequence.identity, sequence.geometry, capability
    ) as stream:
        stream.write(sequence.block(0, sequence.tokens))
        stream.add_sample(sample)
    store.seal(sequence.context_id, shard.shard_id, capability, sequence.token_ids)


def status(store: Store) -> IndexStatus:
    (inventory,), _ = store.inventory()
    return inventory.index


def kind_that_answers(store: Store, sequence: Sequence, handle: int) -> str:
    rows = rows_for(handle, Span(0, sequence.tokens))
    (result,) = store.attend(0, [rows], SCALE, 0.0).results
    assert isinstance(result, AttendResult)
    expected = sequence.reference(0, rows.queries, rows.scope)
    np.testing.assert_allclose(result.partial.output, expected.output, atol=1e-4)
    return result.index_kind


def test_flat_answers_from_the_seal_on_and_the_built_index_takes_its_place(gate):
    sequence = Sequence(30)
    store, builder = gated_store()
    put_with_sample(store, sequence)
    handle, _ = open_session(store, sequence, 30)
    assert gate.entered.wait(10)
    assert kind_that_answers(store, sequence, handle) == "flat"
    before = status(store)
    assert (before.serving_kind, before.target_kind) == ("flat", "gated")
    assert (before.built, before.total) == (1, 4)
    assert store.stats().index_bytes > 0  # the query sample waits for its build
    gate.go_on.set()
    assert builder.wait_idle(10)
    assert kind_that_answers(store, sequence, handle) == "gated"
    after = status(store)
    assert (after.serving_kind, after.target_kind) == ("gated", "gated")
    assert (after.built, after.total, after.bytes, after.error) == (4, 4, 2000, "")
    assert after.build_cpu_s > 0
    assert store.stats().index_bytes == 2000
    assert store.drop("ctx-test", write_capability()) >= 2000
    assert store.stats().index_bytes == 0


def test_a_build_gets_its_layer_s_query_sample_and_runs_at_low_priority(gate):
    sequence = Sequence(30)
    store, builder = gated_store()
    gate.go_on.set()
    put_with_sample(store, sequence)
    assert builder.wait_idle(10)
    assert gate.samples[0].queries.shape == (4, 4, 8)
    assert gate.samples[1] is None
    assert min(gate.niceness) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)


def test_a_drop_cancels_the_build(gate):
    sequence = Sequence(30)
    store, builder = gated_store()
    put_with_sample(store, sequence)
    assert gate.entered.wait(10)
    store.drop("ctx-test", write_capability())
    assert gate.cancelled.wait(10)
    assert builder.wait_idle(10)
    assert store.stats().index_bytes == 0
    assert store.stats().context_bytes == 0


def test_a_failed_build_is_shown_and_flat_goes_on_answering(gate):
    sequence = Sequence(30)
    store, builder = gated_store()
    gate.fails = True
    gate.go_on.set()
    put_with_sample(store, sequence)
    assert builder.wait_idle(10)
    failed = status(store)
    assert (failed.serving_kind, failed.target_kind) == ("flat", "gated")
    assert (failed.built, failed.total) == (0, 4)
    assert "ArithmeticError: no such luck" in failed.error
    handle, _ = open_session(store, sequence, 30)
    assert kind_that_answers(store, sequence, handle) == "flat"


def test_an_index_that_does_not_fit_the_memory_is_given_up(gate):
    sequence = Sequence(30)
    store, builder = gated_store()
    gate.nbytes = 1 << 21
    gate.go_on.set()
    put_with_sample(store, sequence)
    assert builder.wait_idle(10)
    assert "--memory-limit-bytes" in status(store).error
    assert status(store).serving_kind == "flat"
    assert store.stats().index_bytes == 0


def test_an_index_that_is_finished_after_the_drop_is_not_counted(gate):
    sequence = Sequence(30)
    store, builder = gated_store()
    put_with_sample(store, sequence)
    assert gate.entered.wait(10)
    gate.heeds_cancel = False
    store.drop("ctx-test", write_capability())
    gate.go_on.set()
    assert builder.wait_idle(10)
    assert store.stats().index_bytes == 0


def test_a_drop_frees_the_arrays_of_shards_that_are_built_or_wait_for_a_build(gate, tmp_path):
    first, second = Sequence(30), Sequence(20, context_id="ctx-second")
    store, builder = gated_store(snapshots=Snapshots(tmp_path, "gated"))
    put_with_sample(store, first)
    assert gate.entered.wait(10)
    put_with_sample(store, second)
    waiting = arrays_of(store, "ctx-second")
    store.drop("ctx-second", write_capability("ctx-second"))
    store._snapshots.wait_idle(10)
    gc.collect()
    assert [array() for array in waiting] == [None, None]
    gate.go_on.set()
    assert builder.wait_idle(10)
    built = arrays_of(store, "ctx-test")
    store.drop("ctx-test", write_capability())
    gc.collect()
    assert [array() for array in built] == [None, None]


def test_an_unknown_kind_fails_at_start_and_names_the_known_ones():
    with pytest.raises(InvalidRequest, match="flat"):
        make_store(kind="flatt")
