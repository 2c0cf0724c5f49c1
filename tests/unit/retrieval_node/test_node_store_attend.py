"""Attend answers what full attention over the scope would, however the scope is split."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_harness import (
    EXACT,
    GEOMETRY,
    SCALE,
    Sequence,
    make_store,
    open_session,
    put,
    rows_for,
    write_capability,
)

from longreach.attention import merge
from longreach.errors import InvalidRequest, LongreachError, MalformedTensor, NotFound
from longreach.types import AttendResult, AttendRows, LayerGeometry, PartialAttention, Span


def answered(result: AttendResult | LongreachError) -> AttendResult:
    assert isinstance(result, AttendResult), result
    return result


def assert_same(partial: PartialAttention, expected: PartialAttention) -> None:
    np.testing.assert_allclose(partial.lse, expected.lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(partial.output, expected.output, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_split_into_shards_and_tail_gives_the_attention_over_the_scope(data):
    tokens = data.draw(st.integers(2, 90))
    context_stop = data.draw(st.integers(1, tokens))
    stored = data.draw(st.integers(context_stop, tokens))
    cut = data.draw(st.integers(1, stored))
    start = data.draw(st.integers(0, tokens))
    scope = Span(start, data.draw(st.integers(start, tokens)))
    by_head = data.draw(st.booleans())
    sequence = Sequence(tokens, seed=data.draw(st.integers(0, 5)))
    store = make_store()
    for first, stop in {(0, cut), (cut, stored)}:
        if first < stop and by_head:
            for head in (0, 1):
                name = f"{first}-{head}"
                put(
                    store,
                    sequence,
                    sequence.shard(
                        first, stop, shard_id=name, kv_head_start=head, kv_head_stop=head + 1
                    ),
                )
        elif first < stop:
            put(store, sequence, sequence.shard(first, stop))
    handle, stop = open_session(store, sequence, context_stop)
    assert stop == context_stop
    if context_stop < tokens:
        store.append(sequence.entry(handle, context_stop, tokens))
    rows = rows_for(handle, scope, rows=data.draw(st.integers(1, 3)))
    result = answered(store.attend(1, [rows], SCALE, 0.0).results[0])
    assert_same(result.partial, sequence.reference(1, rows.queries, scope))
    assert result.work.keys_in_scope == rows.queries.shape[0] * 2 * len(scope)
    assert result.work.coverage == 1.0


def test_rows_of_several_sessions_share_a_call_and_keep_their_order():
    sequence, other = Sequence(40), Sequence(30, context_id="ctx-other", seed=3)
    store = make_store()
    put(store, sequence, sequence.shard())
    put(store, other, other.shard())
    asked = [
        (sequence, rows_for(open_session(store, sequence, 40, session_id="a")[0], Span(0, 40))),
        (other, rows_for(open_session(store, other, 30, session_id="b")[0], Span(5, 20), seed=2)),
        (
            sequence,
            rows_for(open_session(store, sequence, 9, session_id="c")[0], Span(0, 9), rows=2),
        ),
    ]
    results = store.attend(0, [rows for _, rows in asked], SCALE, 0.0).results
    for (owner, rows), result in zip(asked, results, strict=True):
        assert_same(answered(result).partial, owner.reference(0, rows.queries, rows.scope))


def test_a_session_never_sees_its_context_beyond_its_own_stop():
    sequence = Sequence(40)
    store = make_store()
    put(store, sequence, sequence.shard())
    handle, _ = open_session(store, sequence, 10)
    rows = rows_for(handle, Span(0, 40))
    result = answered(store.attend(0, [rows], SCALE, 0.0).results[0])
    assert_same(result.partial, sequence.reference(0, rows.queries, Span(0, 10)))
    assert result.work.coverage == pytest.approx(10 / 40)


def test_two_nodes_that_hold_parts_merge_to_full_attention_with_honest_coverage():
    sequence = Sequence(64)
    parts = []
    for start, stop in ((0, 24), (24, 64)):
        store = make_store()
        put(store, sequence, sequence.shard(start, stop))
        handle, _ = open_session(store, sequence, 64)
        rows = rows_for(handle, Span(4, 60))
        result = answered(store.attend(0, [rows], SCALE, 0.0).results[0])
        held = len(Span(4, 60).intersect(Span(start, stop)))
        assert result.work.keys_covered == 2 * held
        assert result.work.keys_in_scope == 2 * 56
        parts.append(result.partial)
    assert_same(merge(parts), sequence.reference(0, rows.queries, Span(4, 60)))


def test_heads_are_asked_apart_and_give_their_own_part_of_the_answer():
    sequence = Sequence(33)
    store = make_store()
    put(store, sequence, sequence.shard())
    handle, _ = open_session(store, sequence, 33)
    rows = rows_for(handle, Span(0, 33), heads=(1, 2))
    result = answered(store.attend(0, [rows], SCALE, 0.0).results[0])
    assert_same(result.partial, sequence.reference(0, rows.queries, Span(0, 33), (1, 2)))


def test_sixteen_bit_storage_is_attended_in_float32():
    sequence = Sequence(50, dtype="bfloat16")
    store = make_store()
    put(store, sequence, sequence.shard(0, 40))
    handle, _ = open_session(store, sequence, 40)
    store.append(sequence.entry(handle, 40, 50))
    rows = rows_for(handle, Span(0, 50))
    result = answered(store.attend(0, [rows], SCALE, 0.0).results[0])
    assert_same(result.partial, sequence.reference(0, rows.queries, Span(0, 50)))


def test_an_empty_scope_sees_no_key():
    sequence = Sequence(8)
    store = make_store()
    put(store, sequence, sequence.shard())
    handle, _ = open_session(store, sequence, 8)
    result = answered(store.attend(0, [rows_for(handle, Span(3, 3))], SCALE, 0.0).results[0])
    assert np.isneginf(result.partial.lse).all()
    assert not result.partial.output.any()
    assert result.work.coverage == 1.0


def bad_rows(handle: int) -> dict[str, AttendRows]:
    good = rows_for(handle, Span(0, 8))
    nan = good.queries.copy()
    nan[0, 1, 2] = math.nan

    def changed(**changes):
        values = {name: getattr(good, name) for name in AttendRows.__slots__}
        return AttendRows(**{**values, **changes})

    return {
        "forged handle": changed(handle=handle ^ 1),
        "heads beyond the layer": changed(kv_head_start=1, kv_head_stop=3),
        "no heads": changed(kv_head_stop=0),
        "wrong q_heads": changed(queries=good.queries[:, :3]),
        "wrong head_dim": changed(queries=good.queries[..., :7]),
        "no rows": changed(queries=good.queries[:0]),
        "NaN": changed(queries=nan),
        "floor of another shape": changed(logit_floor=np.zeros((2, 4), np.float32)),
    }


@pytest.mark.parametrize("what", bad_rows(1))
def test_a_bad_row_is_an_error_for_itself_alone(what):
    sequence = Sequence(8)
    store = make_store()
    put(store, sequence, sequence.shard())
    handle, _ = open_session(store, sequence, 8)
    good = rows_for(handle, Span(0, 8))
    first, bad, last = store.attend(0, [good, bad_rows(handle)[what], good], SCALE, 0.0).results
    expected = NotFound if what == "forged handle" else (InvalidRequest, MalformedTensor)
    assert isinstance(bad, expected)
    for result in (first, last):
        assert_same(answered(result).partial, sequence.reference(0, good.queries, Span(0, 8)))


def test_an_unknown_layer_and_a_sliding_layer_are_refused_by_name():
    geometry = (GEOMETRY[0], LayerGeometry(1, 4, 2, 8, 6, sliding_window=16))
    sequence = Sequence(8, geometry=geometry)
    store = make_store()
    put(store, sequence, sequence.shard())
    handle, _ = open_session(store, sequence, 8)
    rows = rows_for(handle, Span(0, 8))
    (sliding,) = store.attend(1, [rows], SCALE, 0.0).results
    (unknown,) = store.attend(7, [rows], SCALE, 0.0).results
    assert isinstance(sliding, InvalidRequest)
    assert sliding.reason == "SLIDING_LAYER"
    assert isinstance(unknown, InvalidRequest)
    assert "layer 7" in unknown.message


def test_a_drop_while_attending_leaves_the_attend_whole_and_ends_the_session():
    sequence = Sequence(64)
    store = make_store()
    put(store, sequence, sequence.shard())
    handle, _ = open_session(store, sequence, 64)
    rows = rows_for(handle, Span(0, 64), budget=EXACT)
    expected = sequence.reference(0, rows.queries, Span(0, 64))
    seen: list[AttendResult | LongreachError] = []
    began = threading.Event()

    def keep_attending():
        while not seen or isinstance(seen[-1], AttendResult):
            seen.extend(store.attend(0, [rows], SCALE, 0.0).results)
            began.set()

    thread = threading.Thread(target=keep_attending)
    thread.start()
    began.wait(10)
    freed = store.drop("ctx-test", write_capability())
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(seen[-1], NotFound)
    for result in seen[:-1]:
        assert_same(answered(result).partial, expected)
    kv_bytes = sum(a.nbytes for a in (*sequence.keys.values(), *sequence.values.values()))
    assert freed >= kv_bytes
    assert store.stats().context_bytes == 0


def test_work_and_requests_are_counted():
    sequence = Sequence(20)
    store = make_store()
    put(store, sequence, sequence.shard())
    handle, _ = open_session(store, sequence, 20)
    for _ in range(3):
        store.attend(0, [rows_for(handle, Span(0, 20))], SCALE, 0.0)
    stats = store.stats()
    assert stats.attend_requests == 3
    assert stats.work.keys_in_scope == stats.work.keys_covered == 3 * 2 * 20
    assert stats.work.keys_attended == 3 * 2 * 20
