"""Filling and sealing: any order, repeats, gaps, conflicts, identity, capabilities and memory."""

from __future__ import annotations

import dataclasses
import time
import zlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_harness import (
    GEOMETRY,
    Clock,
    Sequence,
    make_store,
    open_session,
    put,
    read_capability,
    session_record,
    write_capability,
)

from longreach.errors import (
    FailedPrecondition,
    IdentityMismatch,
    InvalidRequest,
    LongreachError,
    MalformedTensor,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from longreach.security import Capability, sign
from longreach.types import KvBlock, LayerGeometry, QuerySample, Span
from retrieval_node.spans import SpanSet


def begin(store, sequence, shard, **changes):
    values = {
        "context_id": sequence.context_id,
        "identity": sequence.identity,
        "layers": sequence.geometry,
        "capability": write_capability(sequence.context_id),
        **changes,
    }
    return store.put(
        values["context_id"], shard, values["identity"], values["layers"], values["capability"]
    )


def seal(store, sequence, shard):
    ids = sequence.token_ids[shard.span.start : shard.span.stop]
    return store.seal(sequence.context_id, shard.shard_id, write_capability(), ids)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=12), st.integers(0, 30))
def test_a_span_set_agrees_with_a_set_of_positions(spans, start):
    written, expected = SpanSet(), set()
    for first, length in spans:
        written.add(Span(first, first + length))
        expected |= set(range(first, first + length))
    asked = Span(start, start + 10)
    inside = {p for part in written.overlaps(asked) for p in range(part.start, part.stop)}
    missing = sorted(set(range(start, start + 10)) - expected)
    assert len(written) == len(expected)
    assert inside == expected & set(range(start, start + 10))
    assert written.first_gap(asked) == (missing[0] if missing else None)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_blocks_in_any_order_with_overlaps_seal_to_the_same_shard(data):
    sequence = Sequence(24)
    pieces = [
        sequence.block(start, start + 6, heads, layers)
        for start in range(0, 24, 6)
        for heads in ((0, 1), (1, 2))
        for layers in ((0,), (1,))
    ]
    extra = sequence.block(*sorted(data.draw(st.lists(st.integers(0, 24), min_size=2, max_size=2))))
    order = data.draw(st.permutations([*pieces, extra]))
    store = make_store()
    shard = sequence.shard()
    with begin(store, sequence, shard) as stream:
        for block in order:
            stream.write(block)
    checksum, nbytes = seal(store, sequence, shard)
    expected = 0
    for layer in (0, 1):
        for head in (0, 1):
            expected = zlib.crc32(sequence.keys[layer][head].tobytes(), expected)
            expected = zlib.crc32(sequence.values[layer][head].tobytes(), expected)
    assert checksum == expected
    assert nbytes == sum(a.nbytes for s in (sequence.keys, sequence.values) for a in s.values())
    store.close()


def test_a_shard_is_invisible_until_it_is_sealed():
    sequence = Sequence(12)
    store = make_store()
    with begin(store, sequence, sequence.shard()) as stream:
        stream.write(sequence.block(0, 12))
    with pytest.raises(NotFound, match="not sealed yet"):
        open_session(store, sequence, 12)
    seal(store, sequence, sequence.shard())
    assert open_session(store, sequence, 12)[1] == 12


def test_the_first_gap_is_named_by_layer_head_and_position():
    sequence = Sequence(12)
    store = make_store()
    with begin(store, sequence, sequence.shard()) as stream:
        stream.write(sequence.block(0, 12, layers=(0,)))
        stream.write(sequence.block(0, 12, heads=(0, 1), layers=(1,)))
        stream.write(sequence.block(0, 5, heads=(1, 2), layers=(1,)))
        stream.write(sequence.block(7, 12, heads=(1, 2), layers=(1,)))
    with pytest.raises(FailedPrecondition, match="layer 1, KV head 1 lacks position 5"):
        seal(store, sequence, sequence.shard())
    with begin(store, sequence, sequence.shard()) as stream:
        stream.write(sequence.block(5, 7, heads=(1, 2), layers=(1,)))
    seal(store, sequence, sequence.shard())


def test_other_bytes_at_a_written_position_are_an_error_and_change_nothing():
    sequence = Sequence(12)
    clean = put(make_store(), sequence, sequence.shard())
    store = make_store()
    block = sequence.block(6, 12)
    values = block.values.copy()
    values[1, 1, 1, 5] += 1
    with begin(store, sequence, sequence.shard()) as stream:
        stream.write(sequence.block(0, 8))
        stored = stream.bytes_stored
        with pytest.raises(FailedPrecondition, match=r"layer 1, KV head 1, positions \[6, 8\)"):
            stream.write(KvBlock(block.layers, 0, 6, block.keys, values))
        assert stream.bytes_stored == stored
        stream.write(block)
    assert seal(store, sequence, sequence.shard())[0] == clean


def test_a_sealed_shard_takes_repeats_and_refuses_changes():
    sequence = Sequence(12)
    store = make_store()
    first = put(store, sequence, sequence.shard())
    assert put(store, sequence, sequence.shard()) == first
    with begin(store, sequence, sequence.shard()) as stream:
        block = sequence.block(0, 12)
        with pytest.raises(FailedPrecondition, match="sealed"):
            stream.write(KvBlock(block.layers, 0, 0, block.keys + 1, block.values))
    with pytest.raises(FailedPrecondition, match="token ids"):
        store.seal(
            "ctx-test", sequence.shard().shard_id, write_capability(), np.zeros(12, np.int32)
        )


def test_a_stream_that_is_open_across_the_seal_may_still_repeat():
    sequence = Sequence(12)
    store = make_store()
    with begin(store, sequence, sequence.shard()) as stream:
        stream.write(sequence.block(0, 12))
        seal(store, sequence, sequence.shard())
        stream.write(sequence.block(2, 5))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_their_place(dtype, value):
    sequence = Sequence(12, dtype=dtype)
    sequence.keys[1][1, 7, 3] = value
    store = make_store()
    with (
        begin(store, sequence, sequence.shard()) as stream,
        pytest.raises(MalformedTensor, match=r"keys of layer 1 .* KV head 1, position 7"),
    ):
        stream.write(sequence.block(0, 12))


def test_the_largest_finite_numbers_are_accepted():
    for dtype, info in (
        ("float16", np.finfo(np.float16)),
        ("bfloat16", ml_dtypes.finfo("bfloat16")),
    ):
        sequence = Sequence(4, dtype=dtype)
        sequence.values[0][0, 0, 0] = info.max
        put(make_store(), sequence, sequence.shard())


@pytest.mark.parametrize(
    ("block", "error"),
    [
        (lambda s: s.block(6, 13), InvalidRequest),
        (
            lambda s: KvBlock((2,), 0, 0, *(2 * [np.zeros((1, 2, 4, 8), np.float32)])),
            InvalidRequest,
        ),
        (
            lambda s: KvBlock((0, 0), 0, 0, *(2 * [np.zeros((2, 2, 4, 8), np.float32)])),
            InvalidRequest,
        ),
        (
            lambda s: KvBlock((0,), 1, 0, *(2 * [np.zeros((1, 2, 4, 8), np.float32)])),
            InvalidRequest,
        ),
        (
            lambda s: KvBlock((0,), 0, 0, *(2 * [np.zeros((1, 2, 4, 8), np.float32)])),
            MalformedTensor,
        ),
        (lambda s: Sequence(12, dtype="float16").block(0, 4), MalformedTensor),
        (lambda s: KvBlock((0,), 0, 0, s.keys[0][None], s.values[0][None, :, :3]), MalformedTensor),
    ],
    ids=["positions", "layer", "layer twice", "heads", "value_dim", "dtype", "fewer values"],
)
def test_a_block_that_does_not_fit_its_shard_is_refused(block, error):
    sequence = Sequence(12)
    store = make_store()
    with begin(store, sequence, sequence.shard()) as stream, pytest.raises(error):
        stream.write(block(Sequence(13) if error is InvalidRequest else sequence))


def test_shards_of_one_context_must_not_overlap_nor_differ_in_identity():
    sequence = Sequence(24)
    store = make_store()
    put(store, sequence, sequence.shard(0, 12))
    with pytest.raises(InvalidRequest, match="overlaps shard 'shard-0-12'"):
        begin(store, sequence, sequence.shard(11, 20))
    with pytest.raises(FailedPrecondition, match="another span"):
        begin(store, sequence, sequence.shard(12, 20, shard_id="shard-0-12"))
    changed = dataclasses.replace(sequence.identity, revision="other")
    with pytest.raises(IdentityMismatch, match="revision"):
        begin(store, sequence, sequence.shard(12, 24), identity=changed)
    put(store, sequence, sequence.shard(12, 24))


def test_shards_over_the_same_positions_must_have_the_same_tokens():
    sequence = Sequence(12)
    store = make_store()
    put(store, sequence, sequence.shard(layers=(0,), shard_id="a"))
    other = Sequence(12)
    other.token_ids = sequence.token_ids + 1
    with pytest.raises(FailedPrecondition, match="token ids"):
        put(store, other, sequence.shard(layers=(1,), shard_id="b"))


@pytest.mark.parametrize(
    "change",
    [
        {"layers": (LayerGeometry(0, 4, 2, 8, 6),)},
        {"layers": (LayerGeometry(0, 3, 2, 8, 6), GEOMETRY[1])},
        {"layers": (LayerGeometry(0, 4, 1, 8, 6), GEOMETRY[1])},
        {"context_id": "", "capability": write_capability("")},
    ],
    ids=["layer without geometry", "group not whole", "heads beyond the layer", "no name"],
)
def test_a_header_that_cannot_be_is_refused(change):
    sequence = Sequence(12)
    with pytest.raises(InvalidRequest):
        begin(make_store(), sequence, sequence.shard(), **change)


def test_an_unknown_dtype_names_the_known_ones():
    sequence = Sequence(12)
    identity = dataclasses.replace(sequence.identity, dtype="int8")
    with pytest.raises(InvalidRequest, match="float32, float16, bfloat16"):
        begin(make_store(), sequence, sequence.shard(), identity=identity)


@pytest.mark.parametrize(
    "capability",
    [
        b"",
        b"x" * 100,
        write_capability("ctx-other"),
        write_capability(expires_at=time.time() - 10),
        read_capability(session_record(0, context_id="ctx-test")),
        sign(Capability("write", "t", "ctx-test", time.time() + 99), b"another secret"),
    ],
    ids=["none", "garbage", "other context", "expired", "for reading", "other secret"],
)
def test_writing_needs_a_capability_for_this_context(capability):
    sequence = Sequence(12)
    store = make_store()
    put(store, sequence, sequence.shard())
    with pytest.raises(PermissionDenied):
        begin(store, sequence, sequence.shard(), capability=capability)
    with pytest.raises(PermissionDenied):
        store.seal("ctx-test", sequence.shard().shard_id, capability, sequence.token_ids)
    with pytest.raises(PermissionDenied):
        store.drop("ctx-test", capability)
    assert len(store.inventory()[0]) == 1


def test_a_tenant_cannot_put_kv_in_another_tenant_s_name():
    sequence = Sequence(12)
    capability = write_capability(tenant="mallory")
    with pytest.raises(PermissionDenied, match="mallory"):
        begin(make_store(), sequence, sequence.shard(), capability=capability)


def test_memory_is_reserved_at_the_header_and_freed_by_a_drop():
    sequence = Sequence(100)
    kv_bytes = sum(a.nbytes for s in (sequence.keys, sequence.values) for a in s.values())
    store = make_store(limit_bytes=kv_bytes + 1000)
    with begin(store, sequence, sequence.shard()):
        assert kv_bytes <= store.stats().context_bytes <= kv_bytes + 1000
        other = Sequence(10, context_id="ctx-other")
        with pytest.raises(ResourceExhausted) as refused:
            begin(store, other, other.shard())
    for part in ("ctx-other", str(kv_bytes + 1000), "drop contexts", "--memory-limit-bytes"):
        assert part in refused.value.message
    assert store.drop("ctx-test", write_capability()) >= kv_bytes
    assert store.stats().context_bytes == 0
    put(store, other, other.shard())


def test_query_samples_count_against_the_budget_and_repeats_do_not_count_twice():
    sequence = Sequence(10)
    store = make_store()
    sample = QuerySample(0, 0, np.arange(5), np.ones((4, 5, 8), np.float32))
    with begin(store, sequence, sequence.shard()) as stream:
        stream.add_sample(sample)
        once = store.stats().index_bytes
        stream.add_sample(sample)
        assert store.stats().index_bytes == once >= sample.queries.nbytes
        stream.write(sequence.block(0, 10))
    seal(store, sequence, sequence.shard())
    assert store.stats().index_bytes == 0  # flat needs no sample


def test_a_put_that_writes_into_a_dropped_shard_is_told_so():
    sequence = Sequence(10)
    store = make_store()
    with begin(store, sequence, sequence.shard()) as stream:
        store.drop("ctx-test", write_capability())
        with pytest.raises(FailedPrecondition, match="dropped"):
            stream.write(sequence.block(0, 10))
    assert store.inventory() == ([], [])


def test_an_abandoned_shard_is_dropped_after_its_time_out_and_an_open_stream_is_not():
    sequence = Sequence(10)
    clock = Clock()
    store = make_store(clock=clock)
    with begin(store, sequence, sequence.shard()):
        clock.now += 100
        store.expire(60, 1e9)
        assert len(store.inventory()[0]) == 1
    clock.now += 59
    store.expire(60, 1e9)
    assert len(store.inventory()[0]) == 1
    clock.now += 2
    store.expire(60, 1e9)
    assert store.inventory() == ([], [])
    assert store.stats().context_bytes == 0


def test_sealing_what_was_never_put_is_not_found():
    with pytest.raises(NotFound, match="put it first"):
        make_store().seal("ctx-test", "s", write_capability(), np.zeros(1, np.int32))


def test_a_seal_needs_one_token_id_for_each_position():
    sequence = Sequence(10)
    store = make_store()
    with begin(store, sequence, sequence.shard()) as stream:
        stream.write(sequence.block(0, 10))
    with pytest.raises(LongreachError, match="9 token ids"):
        store.seal("ctx-test", "shard-0-10", write_capability(), sequence.token_ids[:9])
