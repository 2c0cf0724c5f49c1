"""Attend messages: many sessions in one tensor, each row bound to its entry."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach import wire
from longreach.errors import Internal, InvalidRequest, MalformedTensor, NotFound, Unavailable
from longreach.types import (
    BFLOAT16,
    AttendResult,
    AttendRows,
    Budget,
    PartialAttention,
    Span,
    WorkFigures,
)
from longreach.v1 import retrieval_pb2
from longreach.wire import NodeTiming


def rows_of(count=2, kv_heads=2, group=3, dim=8, dtype=np.float32, handle=1, seed=0, floor=False):
    rng = np.random.default_rng(seed)
    shape = (count, kv_heads * group, dim)
    return AttendRows(
        handle=handle,
        kv_head_start=4,
        kv_head_stop=4 + kv_heads,
        scope=Span(128, 4096),
        budget=Budget(top_k=100),
        queries=rng.standard_normal(shape).astype(dtype),
        logit_floor=rng.standard_normal(shape[:2]).astype(np.float32) if floor else None,
    )


def over_the_wire(message):
    return type(message).FromString(message.SerializeToString())


@settings(deadline=None, max_examples=30)
@given(
    entries=st.lists(
        st.tuples(
            st.integers(1, 3),
            st.integers(1, 3),
            st.integers(1, 4),
            st.booleans(),
            st.integers(0, 2**64 - 1),
        ),
        min_size=1,
        max_size=5,
    ),
    dtype=st.sampled_from([np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]),
)
def test_rows_of_any_sessions_survive_in_order(entries, dtype):
    sent = [
        rows_of(count, kv_heads, group, 8, dtype, handle, seed, floor)
        for seed, (count, kv_heads, group, floor, handle) in enumerate(entries)
    ]
    request = over_the_wire(wire.attend_request(77, 5, sent, 0.25, 30.0))
    assert (request.request_id, request.layer, request.scale, request.softcap) == (77, 5, 0.25, 30)
    received = wire.attend_rows_from_proto(request)
    for one, other in zip(received, sent, strict=True):
        np.testing.assert_array_equal(one.queries, other.queries)
        assert one.queries.dtype == dtype
        if other.logit_floor is None:
            assert one.logit_floor is None
        else:
            np.testing.assert_array_equal(one.logit_floor, other.logit_floor)
        assert (one.handle, one.kv_head_start, one.kv_head_stop, one.scope, one.budget) == (
            other.handle,
            other.kv_head_start,
            other.kv_head_stop,
            other.scope,
            other.budget,
        )


def test_decoded_queries_are_views_of_the_message():
    request = over_the_wire(wire.attend_request(1, 0, [rows_of(), rows_of()], 1.0, 0.0))
    first, second = wire.attend_rows_from_proto(request)
    assert first.queries.base is not None
    assert first.queries.base is second.queries.base


def test_rows_that_cannot_share_a_message_are_refused_when_sent():
    with pytest.raises(InvalidRequest, match="float16 x 8, float32 x 8"):
        wire.attend_request(1, 0, [rows_of(), rows_of(dtype=np.float16)], 1.0, 0.0)
    with pytest.raises(InvalidRequest, match="no rows"):
        wire.attend_request(1, 0, [], 1.0, 0.0)


def broken(**changes):
    """A request of two good entries, with fields of the second changed."""
    request = wire.attend_request(1, 0, [rows_of(), rows_of()], 1.0, 0.0)
    for name, value in changes.items():
        setattr(request.rows[1], name, value)
    return request


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"rows": 3}, "name 30 queries but the message holds 24"),
        ({"rows": 1}, "name 18 queries but the message holds 24"),
        ({"rows": 2**32 - 1}, "the message holds 24"),
        ({"q_heads": 0}, "positive multiple"),
        ({"q_heads": 5}, "positive multiple"),
        ({"kv_head_stop": 4}, "positive multiple"),
        ({"kv_head_stop": 8}, "positive multiple"),
    ],
)
def test_entries_that_do_not_add_up_are_refused(changes, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        wire.attend_rows_from_proto(broken(**changes))


def test_a_message_without_entries_is_refused():
    request = wire.attend_request(1, 0, [rows_of()], 1.0, 0.0)
    del request.rows[:]
    with pytest.raises(InvalidRequest, match="0 entries name 0 queries"):
        wire.attend_rows_from_proto(request)
    empty = retrieval_pb2.AttendRequest()
    empty.queries.CopyFrom(wire.tensor_to_proto(np.zeros((0, 8), np.float32)))
    with pytest.raises(InvalidRequest, match="0 entries"):
        wire.attend_rows_from_proto(empty)


def test_tensors_of_a_request_are_checked():
    rows = rows_of()
    rows.queries[1, 2, 3] = np.nan
    with pytest.raises(MalformedTensor, match="NaN"):
        wire.attend_rows_from_proto(wire.attend_request(1, 0, [rows], 1.0, 0.0))
    request = broken()
    request.rows[1].logit_floor.CopyFrom(wire.tensor_to_proto(np.zeros((2, 5), np.float32)))
    with pytest.raises(MalformedTensor, match="logit_floor"):
        wire.attend_rows_from_proto(request)
    request = broken()
    request.queries.CopyFrom(wire.tensor_to_proto(np.zeros((24, 8), np.int32)))
    with pytest.raises(MalformedTensor, match="dtype int32"):
        wire.attend_rows_from_proto(request)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_scale_and_softcap_must_be_finite(number):
    for scale, softcap in ((number, 0.0), (1.0, number)):
        with pytest.raises(InvalidRequest, match="finite"):
            wire.attend_rows_from_proto(wire.attend_request(1, 0, [rows_of()], scale, softcap))


def result_of(rows: AttendRows, value_dim=5, seed=0):
    rng = np.random.default_rng(seed)
    count, q_heads, _ = rows.queries.shape
    lse = rng.standard_normal((count, q_heads)).astype(np.float32)
    lse[0, 0] = -np.inf
    partial = PartialAttention(
        rng.standard_normal((count, q_heads, value_dim)).astype(np.float32), lse
    )
    return AttendResult(partial, WorkFigures(seed + 1, 2, 3, 4, 5, 6, 7), f"kind{seed}")


def test_results_and_errors_come_back_to_the_rows_they_answer():
    sent = [rows_of(2), rows_of(1), rows_of(3)]
    results = [
        result_of(sent[0], seed=0),
        NotFound("no session 5", reason="UNKNOWN_HANDLE"),
        result_of(sent[2], seed=2),
    ]
    shapes = [(*rows.queries.shape[:2], 5) for rows in sent]
    timing = NodeTiming(1e-6, 2e-6, 300e-6, 4e-6)
    response = over_the_wire(wire.attend_response(9, results, shapes, timing))
    assert response.request_id == 9
    assert wire.node_timing_from_proto(response) == timing
    assert timing.total_s == pytest.approx(307e-6)
    back = wire.attend_results_from_proto(response, [shape[:2] for shape in shapes])
    for index in (0, 2):
        np.testing.assert_array_equal(back[index].partial.output, results[index].partial.output)
        np.testing.assert_array_equal(back[index].partial.lse, results[index].partial.lse)
        assert back[index].work == results[index].work
        assert back[index].index_kind == results[index].index_kind
    assert isinstance(back[1], NotFound)
    assert back[1].reason == "UNKNOWN_HANDLE"
    failed = slice(12, 18)
    assert not np.frombuffer(response.outputs.data, np.float32).reshape(-1, 5)[failed].any()
    assert (np.frombuffer(response.lse.data, np.float32)[failed] == -np.inf).all()


def test_a_message_refused_as_a_whole_fails_every_entry():
    response = retrieval_pb2.AttendResponse(request_id=3)
    response.error.CopyFrom(wire.error_to_proto(InvalidRequest("layer 99 is unknown")))
    back = wire.attend_results_from_proto(response, [(1, 6), (2, 6)])
    assert [type(each) for each in back] == [InvalidRequest, InvalidRequest]


def test_replies_that_do_not_answer_the_request_are_refused():
    rows = rows_of()
    response = wire.attend_response(1, [result_of(rows)], [(2, 6, 5)], NodeTiming())
    with pytest.raises(Internal, match="1 entries of 2"):
        wire.attend_results_from_proto(response, [(1, 6), (1, 6)])
    with pytest.raises(MalformedTensor, match="outputs"):
        wire.attend_results_from_proto(response, [(3, 6)])


@pytest.mark.parametrize("field", ["outputs", "lse"])
def test_any_flipped_bit_of_a_reply_is_found_out(field):
    rows = rows_of()
    sound = wire.attend_response(1, [result_of(rows)], [(2, 6, 5)], NodeTiming())
    tensor = getattr(sound, field)
    for bit in range(8 * len(tensor.data)):
        response = retrieval_pb2.AttendResponse.FromString(sound.SerializeToString())
        data = bytearray(tensor.data)
        data[bit // 8] ^= 1 << (bit % 8)
        getattr(response, field).data = bytes(data)
        with pytest.raises(Unavailable, match="checksum") as caught:
            wire.attend_results_from_proto(response, [(2, 6)])
        assert caught.value.reason == "DAMAGED_REPLY"
    assert wire.attend_results_from_proto(sound, [(2, 6)])


def test_results_and_shapes_must_pair_up_when_encoded():
    rows = rows_of()
    with pytest.raises(ValueError):  # noqa: PT011
        wire.attend_response(1, [result_of(rows)], [], NodeTiming())


def test_a_request_of_one_token_costs_little_more_than_its_queries():
    rows = rows_of(1, 8, 4, 128, BFLOAT16)
    rows = dataclasses.replace(rows, handle=2**64 - 1)
    request = wire.attend_request(2**40, 31, [rows], 0.088, 0.0)
    assert request.ByteSize() - rows.queries.nbytes < 100
