"""Sessions: handles, epochs, appends, takeover and reading back."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_harness import (
    GEOMETRY,
    SCALE,
    Clock,
    Sequence,
    make_store,
    open_session,
    put,
    read_capability,
    rows_for,
    session_record,
    write_capability,
)

from longreach.errors import (
    FailedPrecondition,
    IdentityMismatch,
    InvalidRequest,
    MalformedTensor,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    StaleEpoch,
)
from longreach.types import AppendEntry, AttendResult, KvBlock, LayerGeometry, Span


@pytest.fixture
def sequence():
    return Sequence(60)


@pytest.fixture
def store(sequence):
    made = make_store()
    put(made, sequence, sequence.shard(0, 40))
    return made


def changed(entry: AppendEntry, delta: float = 1.0) -> AppendEntry:
    (block,) = entry.blocks
    other = KvBlock(
        block.layers, block.kv_head_start, block.start, block.keys + delta, block.values
    )
    return AppendEntry(entry.handle, entry.epoch, entry.start, entry.token_ids, (other,))


def tail_bytes(store, handle, span: Span, layer: int = 0) -> bytes:
    blocks = sorted(store.read(handle, span, [layer]), key=lambda block: block.start)
    return b"".join(np.moveaxis(b.keys[0], 0, 1).tobytes() for b in blocks)


def stored(sequence, span: Span, layer: int = 0) -> bytes:
    return np.moveaxis(sequence.keys[layer][:, span.start : span.stop], 0, 1).tobytes()


def test_appends_are_acknowledged_up_to_the_contiguous_stop(store, sequence):
    handle, stop = open_session(store, sequence, 40)
    assert stop == 40
    assert store.append(sequence.entry(handle, 40, 44)) == (44, None)
    assert store.append(sequence.entry(handle, 44, 45)) == (45, None)
    stop, refused = store.append(sequence.entry(handle, 46, 47))
    assert stop == 45
    assert isinstance(refused, FailedPrecondition)
    assert refused.reason == "APPEND_GAP"
    assert "append from 45 on" in refused.message


def test_the_same_epoch_and_bytes_change_nothing(store, sequence):
    handle, _ = open_session(store, sequence, 40)
    store.append(sequence.entry(handle, 40, 50))
    for start, stop in ((40, 50), (43, 47), (45, 55), (40, 55)):
        expected = max(50, stop)
        answer, refused = store.append(sequence.entry(handle, start, stop))
        assert refused is None
        assert answer >= expected
    assert tail_bytes(store, handle, Span(40, 55)) == stored(sequence, Span(40, 55))


def test_the_same_epoch_with_other_bytes_or_tokens_is_an_error(store, sequence):
    handle, _ = open_session(store, sequence, 40)
    store.append(sequence.entry(handle, 40, 50))
    _, refused = store.append(changed(sequence.entry(handle, 45, 55)))
    assert isinstance(refused, FailedPrecondition)
    assert refused.reason == "CONFLICTING_BYTES"
    entry = sequence.entry(handle, 45, 46)
    tokens = AppendEntry(handle, 1, 45, (entry.token_ids[0] + 1,), entry.blocks)
    assert isinstance(store.append(tokens)[1], FailedPrecondition)
    assert tail_bytes(store, handle, Span(40, 60)) == stored(sequence, Span(40, 50))


def test_a_newer_epoch_truncates_at_its_start(store, sequence):
    handle, _ = open_session(store, sequence, 40)
    store.append(sequence.entry(handle, 40, 50))
    newer, stop = open_session(store, sequence, 40, epoch=2)
    assert stop == 50
    assert store.append(changed(sequence.entry(newer, 46, 48, epoch=2))) == (48, None)
    read = tail_bytes(store, newer, Span(40, 60))
    assert read[: len(stored(sequence, Span(40, 46)))] == stored(sequence, Span(40, 46))
    assert len(read) == len(stored(sequence, Span(40, 48)))


def test_a_takeover_stands_where_the_tokens_it_knows_end(store, sequence):
    handle, _ = open_session(store, sequence, 40)
    entry = sequence.entry(handle, 40, 50)
    store.append(entry)

    def stop(epoch, known):
        record = dataclasses.replace(
            session_record(40, epoch), prompt_ids=known[:2], generated_ids=known[2:]
        )
        capability = read_capability(record)
        shards = [sequence.shard()]
        return store.open_session(capability, record, sequence.identity, shards, sequence.geometry)[
            1
        ]

    ids = tuple(entry.token_ids)
    assert stop(2, ids) == 50
    assert stop(3, (*ids, 7)) == 50
    assert stop(4, ids[:6]) == 46
    assert stop(5, (*ids[:4], ids[4] + 1, *ids[5:])) == 44


def test_a_takeover_fences_the_older_worker_everywhere(store, sequence):
    handle, _ = open_session(store, sequence, 40)
    newer, _ = open_session(store, sequence, 40, epoch=2)
    assert handle != newer
    assert isinstance(store.append(sequence.entry(handle, 40, 41))[1], StaleEpoch)
    assert isinstance(store.append(sequence.entry(newer, 40, 41, epoch=1))[1], StaleEpoch)
    (result,) = store.attend(0, [rows_for(handle, Span(0, 40))], SCALE, 0.0).results
    assert isinstance(result, StaleEpoch)
    for call in (
        lambda: store.close_session(handle),
        lambda: list(store.read(handle, Span(0, 1))),
        lambda: open_session(store, sequence, 40, epoch=1),
    ):
        with pytest.raises(StaleEpoch):
            call()
    assert store.append(sequence.entry(newer, 40, 41, epoch=2)) == (41, None)


def test_opening_again_in_the_same_epoch_gives_the_same_handle(store, sequence):
    handle, _ = open_session(store, sequence, 40)
    store.append(sequence.entry(handle, 40, 43))
    assert open_session(store, sequence, 40) == (handle, 43)


def test_a_reader_keeps_what_it_was_given_when_the_tail_is_truncated_and_rewritten(store, sequence):
    handle, _ = open_session(store, sequence, 40)
    store.append(sequence.entry(handle, 40, 50))
    before = list(store.read(handle, Span(40, 50), [0]))
    newer, _ = open_session(store, sequence, 40, epoch=2)
    store.append(changed(sequence.entry(newer, 40, 50, epoch=2)))
    (block,) = before
    assert np.moveaxis(block.keys[0], 0, 1).tobytes() == stored(sequence, Span(40, 50))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_tail_is_what_an_epoch_by_epoch_model_says(data):
    sequence = Sequence(30)
    store = make_store()
    handle, _ = open_session(store, sequence, 0)
    model: list[int] = []
    epoch = 1
    for _ in range(data.draw(st.integers(1, 10))):
        epoch_sent = data.draw(st.integers(max(1, epoch - 1), epoch + 1))
        start = data.draw(st.integers(0, min(29, len(model) + 2)))
        stop = data.draw(st.integers(start + 1, 30))
        shift = 100 * data.draw(st.integers(0, 1))
        ids = [int(t) + shift for t in sequence.token_ids[start:stop]]
        entry = AppendEntry(handle, epoch_sent, start, tuple(ids), (sequence.block(start, stop),))
        answer, refused = store.append(entry)
        if epoch_sent < epoch:
            assert isinstance(refused, StaleEpoch)
        elif start > len(model):
            assert refused is not None
            assert refused.reason == "APPEND_GAP"
        elif epoch_sent > epoch or not model:
            model[start:] = ids
            epoch = epoch_sent
            assert refused is None
        else:
            overlap = min(len(model), stop) - start
            if model[start : start + overlap] != ids[: max(0, overlap)]:
                assert refused is not None
                assert refused.reason == "CONFLICTING_BYTES"
            else:
                model[start : max(stop, len(model))] = ids + model[stop:]
                assert refused is None
        assert answer == len(model)
    store.close()


def test_an_append_must_hold_every_head_of_every_layer_once(store, sequence):
    handle, _ = open_session(store, sequence, 40)
    ids = (1,)
    whole = sequence.block(40, 41)
    for blocks in (
        (),
        (sequence.block(40, 41, heads=(0, 1)),),
        (sequence.block(40, 41, layers=(0,)),),
        (whole, sequence.block(40, 41, layers=(1,))),
    ):
        _, refused = store.append(AppendEntry(handle, 1, 40, ids, blocks))
        assert isinstance(refused, InvalidRequest)
        assert refused.reason == "INCOMPLETE_APPEND"
    parts = (sequence.block(40, 41, heads=(1, 2)), sequence.block(40, 41, heads=(0, 1)))
    assert store.append(AppendEntry(handle, 1, 40, ids, parts)) == (41, None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_append_of_nan_or_of_another_dtype_or_length_is_refused(store, sequence, value):
    handle, _ = open_session(store, sequence, 40)
    block = sequence.block(40, 42)
    bad = block.keys.copy()
    bad[0, 0, 0, 0] = value
    for keys, values in (
        (bad, block.values),
        (block.keys.astype(np.float16), block.values.astype(np.float16)),
        (block.keys[:, :, :1], block.values),
        (block.keys[..., :5], block.values),
    ):
        _, refused = store.append(
            AppendEntry(handle, 1, 40, (1, 2), (KvBlock(block.layers, 0, 40, keys, values),))
        )
        assert isinstance(refused, MalformedTensor)
    assert open_session(store, sequence, 40) == (handle, 40)


def test_a_node_keeps_the_tail_of_its_own_heads_and_covers_no_others(store, sequence):
    handle, _ = open_session(store, sequence, 40, tail_heads=(1, 2))
    assert store.append(sequence.entry(handle, 40, 60, heads=(1, 2))) == (60, None)
    rows = rows_for(handle, Span(40, 60))
    (result,) = store.attend(0, [rows], SCALE, 0.0).results
    assert isinstance(result, AttendResult)
    assert result.work.coverage == 0.5
    assert np.isneginf(result.partial.lse[:, :2]).all()
    expected = sequence.reference(0, rows.queries[:, 2:], Span(40, 60), (1, 2))
    np.testing.assert_allclose(result.partial.output[:, 2:], expected.output, atol=1e-5)


def test_tails_count_against_the_memory_budget_until_the_session_is_closed():
    sequence = Sequence(3000)
    store = make_store(limit_bytes=200_000)
    handle, _ = open_session(store, sequence, 0)
    assert store.append(sequence.entry(handle, 0, 100)) == (100, None)
    held = store.stats().tail_bytes
    assert held >= 100 * 2 * 2 * (8 + 6) * 4
    stop, refused = store.append(sequence.entry(handle, 100, 3000))
    assert stop == 100
    assert isinstance(refused, ResourceExhausted)
    assert "tail of session 's1'" in refused.message
    assert store.close_session(handle) == held
    assert store.stats().tail_bytes == 0
    with pytest.raises(NotFound):
        store.close_session(handle)


def test_what_is_read_back_is_the_session_s_own_prefix_and_tail(store, sequence):
    other = Sequence(60, seed=9)
    handle, _ = open_session(store, sequence, 25)
    store.append(other.entry(handle, 25, 50))
    for layer in (0, 1):
        read = tail_bytes(store, handle, Span(10, 60), layer)
        expected = stored(sequence, Span(10, 25), layer) + stored(other, Span(25, 50), layer)
        assert read == expected
    with pytest.raises(NotFound, match=r"layers \[5\]"):
        list(store.read(handle, Span(0, 1), [5]))


def test_sliding_layers_are_stored_and_read_back_but_never_indexed():
    geometry = (GEOMETRY[0], LayerGeometry(1, 4, 2, 8, 6, sliding_window=16))
    sequence = Sequence(30, geometry=geometry)
    store = make_store()
    put(store, sequence, sequence.shard(0, 20))
    handle, _ = open_session(store, sequence, 20)
    assert store.append(sequence.entry(handle, 20, 30)) == (30, None)
    assert tail_bytes(store, handle, Span(0, 30), 1) == stored(sequence, Span(0, 30), 1)
    (inventory,), _ = store.inventory()
    assert inventory.index.total == 2  # the heads of layer 0


def test_attends_beside_appends_see_whole_positions(store, sequence):
    handle, _ = open_session(store, sequence, 40)
    stops = [40]
    failures: list[str] = []

    def attend_acknowledged():
        while stops[-1] < 60:
            scope = Span(8, stops[-1])
            rows = rows_for(handle, scope)
            (result,) = store.attend(0, [rows], SCALE, 0.0).results
            expected = sequence.reference(0, rows.queries, scope)
            if not np.allclose(result.partial.output, expected.output, atol=1e-4):
                failures.append(str(scope))

    readers = [threading.Thread(target=attend_acknowledged) for _ in range(2)]
    for reader in readers:
        reader.start()
    for start in range(40, 60):
        stop, refused = store.append(sequence.entry(handle, start, start + 1))
        assert refused is None
        store.append(sequence.entry(handle, 40, stop))  # a retransmission
        stops.append(stop)
    for reader in readers:
        reader.join(20)
        assert not reader.is_alive()
    assert failures == []


def test_long_reads_come_in_blocks_below_the_message_limit():
    geometry = (LayerGeometry(0, 2, 2, 256, 256),)
    sequence = Sequence(3000, geometry=geometry)
    store = make_store()
    put(store, sequence, sequence.shard())
    handle, _ = open_session(store, sequence, 3000)
    blocks = list(store.read(handle, Span(0, 3000)))
    assert len(blocks) > 1
    assert all(block.keys.nbytes + block.values.nbytes <= 4 << 20 for block in blocks)
    assert [b.span.start for b in blocks[1:]] == [b.span.stop for b in blocks[:-1]]


def test_a_dropped_context_ends_its_sessions_and_frees_their_tails(store, sequence):
    handle, _ = open_session(store, sequence, 40)
    alone, _ = open_session(store, sequence, 0, session_id="alone")
    store.append(sequence.entry(handle, 40, 50))
    store.append(sequence.entry(alone, 0, 5))
    assert [each.session_id for each in store.inventory()[1]] == ["alone", "s1"]
    store.drop("ctx-test", write_capability())
    assert isinstance(store.append(sequence.entry(handle, 50, 51))[1], NotFound)
    assert store.append(sequence.entry(alone, 5, 6)) == (6, None)
    assert [each.session_id for each in store.inventory()[1]] == ["alone"]


@pytest.mark.parametrize(
    "changes",
    [
        {"session_id": "another"},
        {"context_id": "ctx-other"},
        {"epoch": 2},
        {"tenant": "another"},
        {"expires_at": 0.0},
    ],
)
def test_a_session_needs_a_capability_for_itself(store, sequence, changes):
    record = session_record(40)
    with pytest.raises(PermissionDenied):
        store.open_session(
            read_capability(record, **changes), record, sequence.identity, [], sequence.geometry
        )


def test_a_tenant_cannot_open_another_tenant_s_kv_with_a_capability_of_its_own(store, sequence):
    record = session_record(40)
    record = type(record)(record.session_id, record.context_id, 40, "mallory", 1)
    with pytest.raises(PermissionDenied, match="mallory"):
        store.open_session(
            read_capability(record), record, sequence.identity, [], sequence.geometry
        )
    identity = type(sequence.identity)("model", "rev", "float32", tenant="mallory")
    with pytest.raises(IdentityMismatch, match="tenant"):
        store.open_session(read_capability(record), record, identity, [], sequence.geometry)


def test_every_differing_field_of_an_identity_is_named(store, sequence):
    identity = type(sequence.identity)(
        "model", "rev2", "float32", "yarn", "dense", sequence.identity.tenant
    )
    record = session_record(40)
    with pytest.raises(IdentityMismatch) as refused:
        store.open_session(read_capability(record), record, identity, [], sequence.geometry)
    assert "revision 'rev' != 'rev2'" in refused.value.message
    assert "rope_regime 'default' != 'yarn'" in refused.value.message


def test_another_geometry_of_a_stored_layer_is_refused(store, sequence):
    record = session_record(40)
    other = (LayerGeometry(0, 8, 2, 8, 6), GEOMETRY[1])
    with pytest.raises(IdentityMismatch, match="layer 0"):
        store.open_session(read_capability(record), record, sequence.identity, [], other)


def test_a_session_cannot_move_to_another_context_position(store, sequence):
    open_session(store, sequence, 40)
    with pytest.raises(FailedPrecondition, match="is open on context 'ctx-test' up to 40"):
        open_session(store, sequence, 39, epoch=2)


def test_handles_are_random_and_never_come_back(store, sequence):
    seen = set()
    for _ in range(50):
        handle, _ = open_session(store, sequence, 40)
        assert handle not in seen
        seen.add(handle)
        store.close_session(handle)
    bits = np.array([[handle >> bit & 1 for bit in range(64)] for handle in seen])
    assert (bits.any(axis=0) & ~bits.all(axis=0)).all()


def test_idle_sessions_are_closed_and_used_ones_are_not(sequence):
    clock = Clock()
    store = make_store(clock=clock)
    put(store, sequence, sequence.shard(0, 40))
    open_session(store, sequence, 40, session_id="idle")
    used, _ = open_session(store, sequence, 40, session_id="used")
    clock.now += 50
    store.append(sequence.entry(used, 40, 41))
    clock.now += 20
    store.expire(1e9, 60)
    assert [each.session_id for each in store.inventory()[1]] == ["used"]
