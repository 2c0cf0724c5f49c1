"""Long tails: chunks that never move, one call for all sessions, indexes over full chunks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_harness import (
    EXACT,
    GEOMETRY,
    SCALE,
    SECRET,
    Sequence,
    make_store,
    open_session,
    put,
    rows_for,
)

from longreach.attention import attention_logits, partial_attention
from longreach.errors import Cancelled, ResourceExhausted
from longreach.types import AttendResult, AttendRows, Budget, LayerGeometry, Span
from retrieval_node import kernel, tail_chunks
from retrieval_node.builds import Builder
from retrieval_node.index.base import INDEX_KINDS, Index
from retrieval_node.memory import MemoryBudget
from retrieval_node.store import Store
from retrieval_node.tail_chunks import CHUNK_POSITIONS

SHORT = 16
"""Positions of a chunk in most tests."""
FLAT = INDEX_KINDS["flat"]


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_chunks, "CHUNK_POSITIONS", SHORT)


class Built(FLAT):  # type: ignore[misc, valid-type]
    """Answers as flat does, but needs a build, which takes no time."""

    kind = "built"
    needs_build = True
    index_bytes = 100


class Gate:
    """Lets builds go on when the test says so."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.built: list[Span] = []
        self.nbytes = 100


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, short_chunks: None) -> Iterator[Gate]:
    """The kind `gated`: builds wait at the gate; its answers are the exact ones to the budget."""
    made = Gate()

    class Gated(FLAT):  # type: ignore[misc, valid-type]
        kind = "gated"
        needs_build = True

        @classmethod
        def build(cls, kv, sample, control) -> Index:
            made.entered.set()
            while not made.go_on.wait(0.005):
                if control.cancelled.is_set():
                    raise Cancelled("dropped")
            made.built.append(kv.positions)
            return cls(kv)

        @property
        def index_bytes(self) -> int:
            return made.nbytes

    monkeypatch.setitem(INDEX_KINDS._entries, "gated", Gated)
    yield made
    made.go_on.set()


def building_store(kind: str, limit_bytes: int = 64 << 20) -> tuple[Store, Builder]:
    memory = MemoryBudget(limit_bytes)
    builder = Builder(memory, kind, 1)
    return Store(secret=SECRET, memory=memory, builder=builder), builder


def attended(store: Store, rows: AttendRows, layer: int = 0) -> AttendResult:
    (result,) = store.attend(layer, [rows], SCALE, 0.0).results
    assert isinstance(result, AttendResult), result
    return result


def assert_full_attention(store: Store, sequence: Sequence, handle: int, scope: Span) -> None:
    for layer in sequence.layers:
        rows = rows_for(handle, scope)
        partial = attended(store, rows, layer).partial
        expected = sequence.reference(layer, rows.queries, scope)
        np.testing.assert_allclose(partial.output, expected.output, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(partial.lse, expected.lse, rtol=1e-5, atol=1e-5)


def key_addresses(store: Store, handle: int) -> list[int]:
    session, _ = store._find(handle)
    return [piece.kv.keys.ctypes.data for piece in session.tail_view(0)]


class CountingNative:
    """The native module, counting calls by name."""

    def __init__(self, native) -> None:
        self._native = native
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str):
        self.calls[name] += 1
        return getattr(self._native, name)


@pytest.mark.parametrize("sessions", [1, 5])
def test_the_tails_of_all_sessions_are_attended_in_one_native_call(
    sessions, monkeypatch, short_chunks
):
    store = make_store()
    asked, owners = [], []
    for number in range(sessions):
        # Tails of one to three chunks, on separate positions and of two dtypes.
        owner = Sequence(10 + 13 * number, ["float32", "bfloat16"][number % 2], seed=number)
        handle, _ = open_session(store, owner, 0, session_id=f"s{number}")
        store.append(owner.entry(handle, 0, owner.tokens))
        asked.append(rows_for(handle, Span(1, owner.tokens), rows=1 + number, seed=number))
        owners.append(owner)
    counting = CountingNative(kernel._native)
    monkeypatch.setattr(kernel, "_native", counting)
    for layer in (0, 1):
        counting.calls.clear()
        results = store.attend(layer, asked, SCALE, 0.0).results
        assert counting.calls == {"attend_exact": 1}
        for owner, rows, result in zip(owners, asked, results, strict=True):
            assert isinstance(result, AttendResult)
            expected = owner.reference(layer, rows.queries, rows.scope)
            np.testing.assert_allclose(result.partial.output, expected.output, atol=1e-5)
            np.testing.assert_allclose(result.partial.lse, expected.lse, atol=1e-5)
            assert result.work.coverage == 1.0


def test_a_tail_beside_a_context_adds_one_native_call(monkeypatch, short_chunks):
    sequence = Sequence(80)
    store = make_store()
    put(store, sequence, sequence.shard(0, 40))
    handle, _ = open_session(store, sequence, 40)
    store.append(sequence.entry(handle, 40, 80))
    counting = CountingNative(kernel._native)
    monkeypatch.setattr(kernel, "_native", counting)
    attended(store, rows_for(handle, Span(0, 80), budget=Budget(top_k=5)))
    assert counting.calls == {"attend_scope": 1, "attend_exact": 1}


def test_full_chunks_never_move_while_the_tail_grows(short_chunks):
    sequence = Sequence(5 * SHORT)
    store = make_store()
    handle, _ = open_session(store, sequence, 0)
    seen: dict[int, int] = {}
    for start, stop in pairwise((0, 3, 15, 17, 33, 64, 79, 80)):
        store.append(sequence.entry(handle, start, stop))
        for number, address in enumerate(key_addresses(store, handle)):
            if (number + 1) * SHORT <= stop:
                assert seen.setdefault(number, address) == address
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_growth_reserves_no_more_than_twice_what_a_short_tail_holds():
    sequence = Sequence(300)
    store = make_store()
    handle, _ = open_session(store, sequence, 0)
    position_bytes = 2 * 2 * (8 + 6) * 4
    for stop in range(1, 301):
        store.append(sequence.entry(handle, stop - 1, stop))
        assert stop * position_bytes <= store.stats().tail_bytes
        assert store.stats().tail_bytes <= max(64, 2 * stop) * position_bytes


def test_a_reader_keeps_a_full_chunk_that_is_truncated_and_written_again(short_chunks):
    sequence, other = Sequence(40), Sequence(40, seed=1)
    store = make_store()
    handle, _ = open_session(store, sequence, 0)
    store.append(sequence.entry(handle, 0, 40))
    before = list(store.read(handle, Span(0, 40), [0]))
    store.append(other.entry(handle, 10, 40, epoch=2))
    kept = np.concatenate([block.keys[0] for block in before], axis=1)
    np.testing.assert_array_equal(kept, sequence.keys[0])
    after = np.concatenate([b.keys[0] for b in store.read(handle, Span(0, 40), [0])], axis=1)
    np.testing.assert_array_equal(after[:, :10], sequence.keys[0][:, :10])
    np.testing.assert_array_equal(after[:, 10:], other.keys[0][:, 10:])


def test_a_truncation_gives_the_memory_of_later_chunks_back(short_chunks):
    sequence = Sequence(100)
    store = make_store()
    handle, _ = open_session(store, sequence, 0)
    store.append(sequence.entry(handle, 0, 20))
    held = store.stats().tail_bytes
    store.append(sequence.entry(handle, 20, 100))
    store.append(sequence.entry(handle, 17, 20, epoch=2))
    assert store.stats().tail_bytes == held
    assert store.close_session(handle) == held
    assert store.stats().tail_bytes == 0


def test_an_append_for_which_memory_lacks_changes_nothing(short_chunks):
    sequence = Sequence(1000)
    store = make_store(limit_bytes=20_000)
    handle, _ = open_session(store, sequence, 0)
    store.append(sequence.entry(handle, 0, 20))
    held = store.stats().tail_bytes
    stop, refused = store.append(sequence.entry(handle, 20, 1000))
    assert isinstance(refused, ResourceExhausted)
    assert (stop, store.stats().tail_bytes) == (20, held)
    assert store.append(sequence.entry(handle, 20, 30)) == (30, None)
    assert_full_attention(store, sequence, handle, Span(0, 30))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_appends_and_truncations_leave_the_bytes_a_plain_array_would(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail_chunks, "CHUNK_POSITIONS", data.draw(st.sampled_from([4, 7, 64])))
        sequences = [Sequence(60, seed=seed) for seed in range(3)]
        model = Sequence(60)  # what the tail must hold, up to `stop`
        stop, epoch = 0, 1
        patch.setitem(INDEX_KINDS._entries, "built", Built)
        store, builder = building_store(data.draw(st.sampled_from(["flat", "built"])))
        handle, _ = open_session(store, model, 0)
        for _ in range(data.draw(st.integers(1, 8))):
            start = data.draw(st.integers(0, min(stop, 59)))
            end = data.draw(st.integers(start + 1, 60))
            source = data.draw(st.sampled_from(sequences))
            epoch += 1  # truncates at `start`
            assert store.append(source.entry(handle, start, end, epoch)) == (end, None)
            assert store.append(source.entry(handle, start, end, epoch)) == (end, None)
            for layer in model.layers:
                model.keys[layer][:, start:end] = source.keys[layer][:, start:end]
                model.values[layer][:, start:end] = source.values[layer][:, start:end]
            stop = end
            if data.draw(st.booleans()):
                assert builder.wait_idle(60)
            first = data.draw(st.integers(0, stop))
            assert_full_attention(store, model, handle, Span(first, stop))
            read = [b.keys[0] for b in store.read(handle, Span(0, 60), [1])]
            np.testing.assert_array_equal(np.concatenate(read, axis=1), model.keys[1][:, :stop])
        store.close_session(handle)
        assert builder.wait_idle(60)
        assert (store.stats().tail_bytes, store.stats().index_bytes) == (0, 0)
        store.close()


def test_a_full_chunk_is_attended_exactly_until_its_index_is_built_and_then_by_the_budget(gate):
    sequence = Sequence(3 * SHORT + 5)
    store, builder = building_store("gated")
    handle, _ = open_session(store, sequence, 0)
    store.append(sequence.entry(handle, 0, sequence.tokens))
    rows = rows_for(handle, Span(2, sequence.tokens), budget=Budget(top_k=3))
    assert gate.entered.wait(60)
    before = attended(store, rows)
    expected = sequence.reference(0, rows.queries, rows.scope)
    np.testing.assert_allclose(before.partial.output, expected.output, atol=1e-5)
    assert before.index_kind == ""
    assert store.stats().index_bytes == 0
    gate.go_on.set()
    assert builder.wait_idle(60)
    after = attended(store, rows)
    assert after.index_kind == "gated"
    assert store.stats().index_bytes == 3 * 2 * gate.nbytes  # chunks, layers
    keep = kept_by_top_k(sequence, rows, 3)
    expected = partial_attention(
        rows.queries, sequence.keys[0], sequence.values[0], SCALE, keep=keep
    )
    np.testing.assert_allclose(after.partial.output, expected.output, atol=1e-5)
    np.testing.assert_allclose(after.partial.lse, expected.lse, atol=1e-5)
    assert_full_attention(store, sequence, handle, Span(2, sequence.tokens))


def kept_by_top_k(sequence: Sequence, rows: AttendRows, top_k: int) -> np.ndarray:
    """[rows, q_heads, n]: the best keys of each full chunk, and all in scope after the last."""
    grouped = rows.queries.reshape(len(rows.queries), 2, 2, -1)
    logits = attention_logits(np.moveaxis(grouped, 0, 2), sequence.keys[0][:, None], SCALE)
    logits = np.moveaxis(logits, 2, 0).reshape(len(rows.queries), 4, -1)
    logits[..., : rows.scope.start] = -np.inf
    full = sequence.tokens // SHORT * SHORT
    keep = logits > -np.inf
    for start in range(0, full, SHORT):
        chunk = logits[..., start : start + SHORT]
        keep[..., start : start + SHORT] = chunk >= np.sort(chunk)[..., -top_k, None]
    return keep


def test_a_logit_floor_drops_the_same_keys_of_a_chunk_with_an_index_as_of_a_shard(gate):
    gate.go_on.set()
    sequence = Sequence(SHORT)
    store, builder = building_store("gated")
    handle, _ = open_session(store, sequence, 0)
    store.append(sequence.entry(handle, 0, SHORT))
    shard_store, shard_builder = building_store("gated")
    put(shard_store, sequence, sequence.shard())
    shard_handle, _ = open_session(shard_store, sequence, SHORT)
    assert builder.wait_idle(60)
    assert shard_builder.wait_idle(60)
    floor = np.full((1, 4), 0.2, np.float32)
    rows = replace(rows_for(handle, Span(0, SHORT), budget=Budget(beta=9.0)), logit_floor=floor)
    of_tail = attended(store, rows)
    of_shard = attended(shard_store, replace(rows, handle=shard_handle))
    assert 0 < of_tail.work.keys_attended < 2 * SHORT
    assert of_tail.work == of_shard.work
    np.testing.assert_allclose(of_tail.partial.lse, of_shard.partial.lse, atol=1e-6)


def test_a_truncation_into_an_indexed_chunk_drops_its_index_and_keeps_those_before(gate):
    gate.go_on.set()
    sequence, other = Sequence(50), Sequence(50, seed=4)
    store, builder = building_store("gated")
    handle, _ = open_session(store, sequence, 0)
    store.append(sequence.entry(handle, 0, 50))
    assert builder.wait_idle(60)
    assert store.stats().index_bytes == 3 * 2 * gate.nbytes
    newer, stop = open_session(store, sequence, 0, epoch=2)
    assert stop == 50
    assert store.stats().index_bytes == 3 * 2 * gate.nbytes  # the bytes are still the same
    store.append(other.entry(newer, 20, 25, epoch=2))
    assert builder.wait_idle(60)
    assert store.stats().index_bytes == 2 * gate.nbytes
    for layer in (0, 1):
        for of in ("keys", "values"):
            getattr(sequence, of)[layer][:, 20:] = getattr(other, of)[layer][:, 20:]
    assert_full_attention(store, sequence, newer, Span(0, 25))
    assert gate.built.count(Span(SHORT, 2 * SHORT)) == 2  # two layers
    store.append(other.entry(newer, 25, 40, epoch=2))
    assert builder.wait_idle(60)
    assert store.stats().index_bytes == 2 * 2 * gate.nbytes
    assert gate.built.count(Span(SHORT, 2 * SHORT)) == 4
    assert gate.built.count(Span(0, SHORT)) == 2
    assert_full_attention(store, sequence, newer, Span(0, 40))


def test_attends_beside_appends_truncations_and_builds_see_whole_positions(short_chunks):
    sequence = Sequence(6 * SHORT)
    store, builder = building_store("sketch")
    handle, _ = open_session(store, sequence, 0)
    store.append(sequence.entry(handle, 0, 2 * SHORT + 3))
    done = threading.Event()
    failures: list[str] = []

    def keep_attending():
        scope = Span(5, SHORT + 2)  # never truncated, though its second chunk is cut and rebuilt
        rows = rows_for(handle, scope)
        expected = sequence.reference(0, rows.queries, scope)
        while not done.is_set():
            (result,) = store.attend(0, [rows], SCALE, 0.0).results
            if not isinstance(result, AttendResult) or not np.allclose(
                result.partial.output, expected.output, atol=1e-4
            ):
                failures.append(repr(result))

    readers = [threading.Thread(target=keep_attending) for _ in range(2)]
    for reader in readers:
        reader.start()
    for epoch in range(2, 30):
        start = SHORT + 2 + epoch % 5
        stop, refused = store.append(sequence.entry(handle, start, start + epoch, epoch))
        assert (stop, refused) == (start + epoch, None)
        store.append(sequence.entry(handle, stop, 6 * SHORT, epoch))
    done.set()
    for reader in readers:
        reader.join(20)
        assert not reader.is_alive()
    assert failures == []
    assert builder.wait_idle(60)
    assert_full_attention(store, sequence, handle, Span(0, 6 * SHORT))


def test_a_takeover_for_other_heads_drops_the_tail_with_its_indexes(gate):
    gate.go_on.set()
    sequence = Sequence(40)
    store, builder = building_store("gated")
    handle, _ = open_session(store, sequence, 0)
    store.append(sequence.entry(handle, 0, 40))
    assert builder.wait_idle(60)
    newer, stop = open_session(store, sequence, 0, epoch=2, tail_heads=(1, 2))
    assert stop == 0
    assert (store.stats().tail_bytes, store.stats().index_bytes) == (0, 0)
    assert store.append(sequence.entry(newer, 0, 40, epoch=2, heads=(1, 2))) == (40, None)


@pytest.mark.parametrize("how", ["close", "truncate"])
def test_closing_and_truncating_cancel_the_build_under_way(gate, how):
    sequence = Sequence(SHORT)
    store, builder = building_store("gated")
    handle, _ = open_session(store, sequence, 0)
    store.append(sequence.entry(handle, 0, SHORT))
    assert gate.entered.wait(60)
    if how == "close":
        store.close_session(handle)
    else:
        store.append(sequence.entry(handle, 3, 5, epoch=2))
    assert builder.wait_idle(60)
    assert gate.built == []
    assert store.stats().index_bytes == 0


def test_memory_is_as_before_when_a_session_with_indexes_is_closed(gate):
    gate.go_on.set()
    sequence = Sequence(40)
    store, builder = building_store("gated")
    handle, _ = open_session(store, sequence, 0)
    store.append(sequence.entry(handle, 0, 40))
    assert builder.wait_idle(60)
    held = store.stats().tail_bytes + store.stats().index_bytes
    assert store.stats().index_bytes > 0
    assert store.close_session(handle) == held
    assert (store.stats().tail_bytes, store.stats().index_bytes) == (0, 0)


def test_a_chunk_whose_index_does_not_fit_is_attended_exactly(gate):
    gate.go_on.set()
    gate.nbytes = 1 << 30
    sequence = Sequence(40)
    store, builder = building_store("gated")
    handle, _ = open_session(store, sequence, 0)
    store.append(sequence.entry(handle, 0, 40))
    assert builder.wait_idle(60)
    rows = rows_for(handle, Span(0, 40), budget=Budget(top_k=1))
    result = attended(store, rows)
    assert result.index_kind == ""
    assert result.work.keys_attended == 2 * 40
    assert store.stats().index_bytes == 0


def test_sliding_layers_of_a_tail_get_no_index(gate):
    gate.go_on.set()
    geometry = (GEOMETRY[0], LayerGeometry(1, 4, 2, 8, 6, sliding_window=16))
    sequence = Sequence(40, geometry=geometry)
    store, builder = building_store("gated")
    handle, _ = open_session(store, sequence, 0)
    store.append(sequence.entry(handle, 0, 40))
    assert builder.wait_idle(60)
    assert gate.built == [Span(0, SHORT), Span(SHORT, 2 * SHORT)]


@pytest.fixture(scope="module")
def long() -> Iterator[tuple[Store, Sequence, int]]:
    """A tail of two full chunks and a rest on a node with the default index kind."""
    sequence = Sequence(2 * CHUNK_POSITIONS + 700)
    store, builder = building_store("auto")
    handle, _ = open_session(store, sequence, 0)
    for start in range(0, sequence.tokens, 10_000):
        stop = min(start + 10_000, sequence.tokens)
        assert store.append(sequence.entry(handle, start, stop)) == (stop, None)
    assert builder.wait_idle(60)
    yield store, sequence, handle
    store.close_session(handle)
    assert (store.stats().tail_bytes, store.stats().index_bytes) == (0, 0)
    store.close()


def peaked_rows(handle: int, scope: Span, budget: Budget) -> AttendRows:
    """Queries long enough that few keys hold most of the attention."""
    rows = rows_for(handle, scope, rows=3, budget=budget)
    return replace(rows, queries=rows.queries * 8)


@pytest.mark.parametrize("start", [0, 12_345, CHUNK_POSITIONS, 2 * CHUNK_POSITIONS - 3000])
def test_the_default_index_over_long_tails_keeps_the_mass_it_was_asked_for(long, start):
    store, sequence, handle = long
    rows = peaked_rows(handle, Span(start, sequence.tokens), Budget(mass=0.9))
    result = attended(store, rows)
    full = sequence.reference(0, rows.queries, rows.scope)
    assert result.index_kind == "sketch"
    # The sketch estimates the mass it leaves out: a tenth less is what its own test grants it.
    kept = np.exp(result.partial.lse - full.lse)
    assert kept.min() >= 0.9 * 0.9
    assert kept.max() <= 1 + 1e-5
    # Softmax over keys that hold `kept` of the mass is this close to softmax over all of them.
    largest = max(np.linalg.norm(head, axis=-1).max() for head in sequence.values[0])
    error = np.linalg.norm(result.partial.output - full.output, axis=-1)
    assert (error <= 2 * (1 - kept) * largest + 1e-4).all()
    assert result.work.coverage == 1.0


def test_a_long_tail_is_searched_where_it_has_indexes_and_read_in_full_after_them(long):
    store, sequence, handle = long
    rows = peaked_rows(handle, Span(0, sequence.tokens), Budget(top_k=32))
    work = attended(store, rows).work
    rest = 3 * 2 * (sequence.tokens - 2 * CHUNK_POSITIONS)
    # Two query heads share a KV head: of each chunk, between 32 and 64 keys join.
    assert rest + 3 * 2 * 2 * 32 <= work.keys_attended <= rest + 3 * 2 * 2 * 64
    assert work.keys_sketched >= 3 * 2 * 2 * CHUNK_POSITIONS
    assert work.keys_scanned < work.keys_in_scope


def test_an_exact_budget_over_long_tails_is_full_attention(long):
    store, sequence, handle = long
    rows = peaked_rows(handle, Span(100, sequence.tokens), EXACT)
    result = attended(store, rows, layer=1)
    expected = sequence.reference(1, rows.queries, rows.scope)
    np.testing.assert_allclose(result.partial.output, expected.output, atol=1e-4)
    np.testing.assert_allclose(result.partial.lse, expected.lse, atol=1e-4)
