"""Every RPC of a node over a real socket, with good and with broken messages."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from node_harness import (
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

from longreach import wire
from longreach.errors import (
    FailedPrecondition,
    IdentityMismatch,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    StaleEpoch,
)
from longreach.rpc.channels import sync_channel
from longreach.rpc.retrieval import AppendStream, NodeClient
from longreach.types import AttendResult, QuerySample, Span
from longreach.v1 import retrieval_pb2 as pb
from longreach.v1.retrieval_pb2_grpc import RetrievalServiceStub
from retrieval_node.server import SERVICE_NAME, start_server
from retrieval_node.store import Store

LIMIT_BYTES = 1 << 20


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Iterator[Store]:
    made = make_store(LIMIT_BYTES, clock=clock)
    yield made
    made.close()


@pytest.fixture
def address(store: Store) -> Iterator[str]:
    server, address, readiness = start_server(store, "127.0.0.1:0", 16)
    readiness.set(True)
    yield address
    server.stop(None).wait()


@pytest.fixture
def client(address: str) -> Iterator[NodeClient]:
    made = NodeClient(address)
    yield made
    made.close()


@pytest.fixture
def stub(address: str) -> Iterator[RetrievalServiceStub]:
    with sync_channel(address) as channel:
        yield RetrievalServiceStub(channel)


def put_over_rpc(client: NodeClient, sequence: Sequence) -> tuple[int, int]:
    shard = sequence.shard()
    stored = client.put(
        sequence.context_id,
        shard,
        sequence.identity,
        sequence.geometry,
        write_capability(sequence.context_id),
        [sequence.block(0, 10), sequence.block(10, sequence.tokens)],
    )
    checksum, sealed = client.seal(
        sequence.context_id,
        shard.shard_id,
        write_capability(sequence.context_id),
        sequence.token_ids,
    )
    assert stored == sealed
    return checksum, sealed


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.01)


def open_over_rpc(client: NodeClient, sequence: Sequence, stop: int, epoch: int = 1) -> int:
    record = session_record(stop, epoch)
    handle, _ = client.open_session(
        read_capability(record), record, sequence.identity, [sequence.shard()], sequence.geometry
    )
    return handle


def test_a_context_is_put_sealed_attended_read_and_dropped(client):
    sequence = Sequence(40, dtype="bfloat16")
    sample = QuerySample(0, 0, np.arange(3), np.ones((4, 3, 8), sequence.keys[0].dtype))
    client.put(
        "ctx-test",
        sequence.shard(),
        sequence.identity,
        sequence.geometry,
        write_capability(),
        [sample],
    )
    checksum, stored = put_over_rpc(client, sequence)
    (inventory,), _ = client.inventory()
    assert (inventory.checksum, inventory.bytes_stored, inventory.sealed) == (
        checksum,
        stored,
        True,
    )
    assert inventory.identity == sequence.identity
    handle = open_over_rpc(client, sequence, 40)
    rows = [rows_for(handle, Span(0, 40)), rows_for(handle, Span(8, 30), rows=3)]
    for each, result in zip(rows, client.attend_once(1, rows, SCALE), strict=True):
        assert isinstance(result, AttendResult)
        expected = sequence.reference(1, each.queries, each.scope)
        np.testing.assert_allclose(result.partial.output, expected.output, atol=1e-4)
        np.testing.assert_allclose(result.partial.lse, expected.lse, atol=1e-4)
        assert result.index_kind == "flat"
    for block in client.read(handle, Span(5, 25)):
        (layer,) = block.layers
        assert block.span == Span(5, 25)
        assert block.keys[0].tobytes() == sequence.keys[layer][:, 5:25].tobytes()
        assert block.values[0].tobytes() == sequence.values[layer][:, 5:25].tobytes()
    assert client.stats().sessions == 1
    assert client.drop("ctx-test", write_capability()) >= stored
    assert client.inventory() == ([], [])
    (gone,) = client.attend_once(1, rows[:1], SCALE)
    assert isinstance(gone, NotFound)


def test_tokens_appended_over_the_stream_are_acknowledged_attended_and_taken_over(client, address):
    sequence = Sequence(60)
    put_over_rpc(client, Sequence(40))
    handle = open_over_rpc(client, sequence, 30)
    acknowledged: queue.Queue = queue.Queue()
    stream = AppendStream(address, lambda *ack: acknowledged.put(ack))
    try:
        for start, stop in ((30, 45), (45, 46), (46, 60)):
            stream.submit([sequence.entry(handle, start, stop)])
            assert acknowledged.get(timeout=10) == (handle, stop, None)
        stream.submit([sequence.entry(handle, 60, 60)])
        assert isinstance(acknowledged.get(timeout=10)[2], InvalidRequest)
        rows = rows_for(handle, Span(30, 60))
        (result,) = client.attend_once(0, [rows], SCALE)
        expected = sequence.reference(0, rows.queries, Span(30, 60))
        np.testing.assert_allclose(result.partial.output, expected.output, atol=1e-4)
        newer = open_over_rpc(client, sequence, 30, epoch=2)
        stream.submit([sequence.entry(handle, 59, 60)])
        assert isinstance(acknowledged.get(timeout=10)[2], StaleEpoch)
        read = {b.layers[0]: b for b in client.read(newer, Span(30, 60))}
        assert read[1].keys[0].tobytes() == sequence.keys[1][:, 30:60].tobytes()
    finally:
        stream.close()
    assert client.close_session(newer) > 0
    assert client.stats().tail_bytes == 0


def test_a_stream_survives_messages_that_no_honest_peer_sends(stub, store):
    sequence = Sequence(16)
    put(store, sequence, sequence.shard())
    handle, _ = open_session(store, sequence, 16)
    rows = rows_for(handle, Span(0, 16))
    good = wire.attend_request(7, 0, [rows], SCALE, 0.0)
    cut = pb.AttendRequest()
    cut.CopyFrom(good)
    cut.queries.data = good.queries.data[:-3]
    nan = pb.AttendRequest()
    nan.CopyFrom(good)
    nan.scale = float("nan")
    forged = pb.AttendRequest()
    forged.CopyFrom(good)
    forged.rows[0].handle ^= 1
    no_budget = pb.AttendRequest()
    no_budget.CopyFrom(good)
    no_budget.rows[0].ClearField("budget")
    backwards = pb.AttendRequest()
    backwards.CopyFrom(good)
    backwards.rows[0].scope.start = 99
    messages = [pb.AttendRequest(request_id=1), cut, nan, forged, no_budget, backwards, good]
    replies = list(stub.Attend(iter(messages)))
    assert [reply.request_id for reply in replies] == [m.request_id for m in messages]
    for reply in replies[:-1]:
        refused = reply.error.message or reply.results[0].error.message
        assert refused
        assert reply.error.code in (0, 3)
    assert replies[3].results[0].error.reason == "UNKNOWN_HANDLE"
    (result,) = wire.attend_results_from_proto(replies[-1], [(1, 4)])
    expected = sequence.reference(0, rows.queries, Span(0, 16))
    np.testing.assert_allclose(result.partial.output, expected.output, atol=1e-4)


def test_messages_with_flipped_bytes_are_answered_or_refused_and_harm_nobody(address, stub, store):
    sequence = Sequence(16)
    put(store, sequence, sequence.shard())
    handle, _ = open_session(store, sequence, 16)
    rows = rows_for(handle, Span(0, 16))
    good = wire.attend_request(7, 0, [rows], SCALE, 0.0)
    whole = pb.AttendOnceRequest(attend=good).SerializeToString()
    rng = np.random.default_rng(0)
    codes = set()
    with sync_channel(address) as channel:
        send = channel.unary_unary(f"/{SERVICE_NAME}/AttendOnce")
        for _ in range(300):
            damaged = bytearray(whole)
            for place in rng.integers(0, 60, 3):
                damaged[place] = rng.integers(0, 256)
            try:
                reply = pb.AttendOnceResponse.FromString(send(bytes(damaged), timeout=10)).attend
            except grpc.RpcError as refused:  # not a message at all
                codes.add(refused.code())
            else:
                assert reply.HasField("error") or reply.results
                assert reply.error.reason != "INTERNAL"
    assert codes <= {grpc.StatusCode.INTERNAL}
    (reply,) = stub.Attend(iter([good]))
    (result,) = wire.attend_results_from_proto(reply, [(1, 4)])
    expected = sequence.reference(0, rows.queries, Span(0, 16))
    np.testing.assert_allclose(result.partial.output, expected.output, atol=1e-4)


def test_an_append_stream_survives_a_broken_entry(stub, store):
    sequence = Sequence(8)
    handle, _ = open_session(store, sequence, 0)
    good = wire.append_entry_to_proto(sequence.entry(handle, 0, 8))
    broken = pb.AppendEntry()
    broken.CopyFrom(good)
    broken.blocks[0].keys.shape[1] = 1 << 30
    request = pb.AppendRequest(request_id=3, entries=[broken, good])
    (reply,) = stub.Append(iter([request]))
    refused, stored = reply.results
    assert refused.error.reason == "MALFORMED_TENSOR"
    assert (stored.stop, stored.HasField("error")) == (8, False)


def test_replies_say_where_the_time_went(stub, store):
    sequence = Sequence(16)
    put(store, sequence, sequence.shard())
    handle, _ = open_session(store, sequence, 16)
    request = wire.attend_request(1, 0, [rows_for(handle, Span(0, 16))], SCALE, 0.0)
    timing = stub.AttendOnce(pb.AttendOnceRequest(attend=request)).attend.timing
    assert timing.attend_us + timing.search_us > 0
    assert timing.merge_us > 0


def test_a_put_without_a_header_and_one_that_is_too_large_are_refused(client, stub):
    with pytest.raises(grpc.RpcError) as refused:
        stub.Put(iter([pb.PutRequest(block=wire.kv_block_to_proto(Sequence(4).block(0, 4)))]))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    huge = Sequence(4)
    shard = huge.shard(0, 1 << 40)
    with pytest.raises(ResourceExhausted) as exhausted:
        client.put("ctx-test", shard, huge.identity, huge.geometry, write_capability(), [])
    assert str(LIMIT_BYTES) in exhausted.value.message
    assert "--memory-limit-bytes" in exhausted.value.message
    assert client.inventory() == ([], [])


def test_a_cancelled_put_may_be_resumed_until_its_time_out_and_then_leaves_nothing(
    client, stub, store, clock
):
    sequence = Sequence(20)
    arrived: queue.Queue = queue.Queue()
    header = pb.PutHeader(
        context_id="ctx-test",
        shard=wire.shard_to_proto(sequence.shard()),
        identity=wire.identity_to_proto(sequence.identity),
        layers=[wire.geometry_to_proto(each) for each in sequence.geometry],
        capability=write_capability(),
    )
    arrived.put(pb.PutRequest(header=header))
    arrived.put(pb.PutRequest(block=wire.kv_block_to_proto(sequence.block(0, 10))))
    call = stub.Put.future(iter(arrived.get, None))
    wait_until(lambda: [s.bytes_stored for s in client.inventory()[0]] == [10 * 2 * 2 * 14 * 4])
    clock.now += 1000
    store.expire(600, 1e9)
    assert len(client.inventory()[0]) == 1  # the stream is open: it may be slow
    call.cancel()
    arrived.put(None)
    put_over_rpc(client, sequence)  # resumes what is there
    handle = open_over_rpc(client, sequence, 20)
    assert client.close_session(handle) == 0
    assert client.drop("ctx-test", write_capability()) > 0

    arrived = queue.Queue()
    arrived.put(pb.PutRequest(header=header))
    call = stub.Put.future(iter(arrived.get, None))
    wait_until(lambda: len(client.inventory()[0]) == 1)
    call.cancel()
    arrived.put(None)

    def expired() -> bool:
        clock.now += 1000
        store.expire(600, 1e9)
        return client.inventory() == ([], [])

    wait_until(expired)
    assert client.stats().context_bytes == 0


def test_errors_keep_their_class_across_the_wire(client):
    sequence = Sequence(20)
    put_over_rpc(client, sequence)
    with pytest.raises(PermissionDenied):
        client.drop("ctx-test", write_capability("ctx-other"))
    with pytest.raises(FailedPrecondition):
        client.seal("ctx-test", "shard-0-20", write_capability(), sequence.token_ids + 1)
    record = session_record(20)
    other = Sequence(20, dtype="float16").identity
    with pytest.raises(IdentityMismatch, match="dtype 'float32' != 'float16'"):
        client.open_session(read_capability(record), record, other, [], [])
    with pytest.raises(NotFound):
        list(client.read(12345, Span(0, 1)))


def test_readiness_follows_the_switch_and_liveness_does_not(store):
    server, address, readiness = start_server(store, "127.0.0.1:0", 16)
    with sync_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def status(service: str) -> int:
            return health.Check(health_pb2.HealthCheckRequest(service=service)).status

        serving = health_pb2.HealthCheckResponse.SERVING
        assert status("") == serving
        assert status(SERVICE_NAME) != serving
        readiness.set(True)
        assert status(SERVICE_NAME) == serving
    server.stop(None).wait()


def test_reflection_lists_the_service_with_its_methods(address):
    with sync_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME)
        (reply,) = stub.ServerReflectionInfo(iter([ask]))
    file = descriptor_pb2.FileDescriptorProto.FromString(
        reply.file_descriptor_response.file_descriptor_proto[0]
    )
    assert "Attend" in {method.name for service in file.service for method in service.method}


def test_one_stream_more_than_allowed_is_refused_and_not_queued(store):
    server, address, _ = start_server(store, "127.0.0.1:0", 1)
    release: queue.Queue = queue.Queue()
    with sync_channel(address) as channel:
        stub = RetrievalServiceStub(channel)
        held = stub.Attend(iter(release.get, None))
        release.put(pb.AttendRequest(request_id=1))
        assert next(held).request_id == 1
        with pytest.raises(grpc.RpcError) as refused:
            stub.Stats(pb.StatsRequest(), timeout=10)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        release.put(None)
        assert list(held) == []
    server.stop(None).wait()
