"""The Attend stream over real gRPC: replies by id, failures that end in time, reconnects."""

import asyncio
import socket
import threading

import grpc
import numpy as np
import pytest
from rpc_servers import echo_response, rows_of, serving

from longreach import wire
from longreach.errors import DeadlineExceeded, Internal, InvalidRequest, Unavailable
from longreach.rpc.channels import MAX_MESSAGE_BYTES
from longreach.rpc.retrieval import AttendStream
from longreach.rpc.status import map_errors
from longreach.v1.retrieval_pb2_grpc import (
    RetrievalServiceServicer,
    add_RetrievalServiceServicer_to_server,
)

HOLD, FAIL, END = 100, 101, 102
"""Layers that make the node behave otherwise."""
BOUNDED_S = 10


class Node(RetrievalServiceServicer):
    """Echoes; keeps back layer HOLD until three are held, then answers them newest first."""

    def __init__(self):
        self.streams = 0
        self.received = threading.Semaphore(0)

    @map_errors
    def Attend(self, request_iterator, context):
        self.streams += 1
        held = []
        for request in request_iterator:
            self.received.release()
            if request.layer == FAIL:
                raise InvalidRequest("layer 101 is unknown; ask for another")
            if request.layer == END:
                return
            if request.layer == HOLD:
                held.append(request)
                if len(held) == 3:
                    yield from map(echo_response, reversed(held))
                    held.clear()
                continue
            yield echo_response(request)


@pytest.fixture
def node():
    servicer = Node()
    with serving(add_RetrievalServiceServicer_to_server, servicer) as (address, server):
        servicer.address, servicer.server = address, server
        yield servicer


@pytest.fixture
async def stream(node):
    stream = AttendStream(node.address)
    yield stream
    await stream.close()


def request(request_id, layer=0):
    return wire.attend_request(request_id, layer, [rows_of(float(request_id))], 1.0, 0.0)


def answered(response):
    """The number that the queries of the answered request held."""
    (result,) = wire.attend_results_from_proto(response, [(1, 4)])
    assert result.index_kind == "echo"
    return float(result.partial.lse[0, 0])


async def ask(stream, request_id):
    await stream.write(request(request_id))
    return answered(await stream.read(request_id))


async def test_replies_find_the_request_they_answer_though_they_come_out_of_order(stream):
    for request_id in (1, 2, 3):
        await stream.write(request(request_id, HOLD))
    assert [answered(await stream.read(request_id)) for request_id in (1, 2, 3)] == [1, 2, 3]


async def test_replies_can_be_read_in_any_order(stream):
    for request_id in range(1, 9):
        await stream.write(request(request_id))
    for request_id in (5, 1, 8, 2, 3, 7, 6, 4):
        assert answered(await stream.read(request_id)) == request_id


async def test_all_requests_share_one_stream(stream, node):
    for request_id in range(1, 20):
        await stream.write(request(request_id))
        await stream.read(request_id)
    assert node.streams == 1


async def test_requests_written_by_many_tasks_are_all_answered(stream):
    numbers = list(range(1, 33))
    assert await asyncio.gather(*(ask(stream, number) for number in numbers)) == numbers


def test_the_loop_may_stop_between_write_and_read(node):
    loop = asyncio.new_event_loop()
    stream = AttendStream(node.address)
    try:
        for step in range(1, 6):
            ids = (2 * step, 2 * step + 1)

            async def write_all(ids=ids):
                for request_id in ids:
                    await stream.write(request(request_id))

            async def collect_all(ids=ids):
                return [answered(await stream.read(request_id)) for request_id in ids]

            loop.run_until_complete(write_all())
            for _ in ids:
                assert node.received.acquire(timeout=BOUNDED_S)
            assert loop.run_until_complete(collect_all()) == list(ids)
    finally:
        loop.run_until_complete(stream.close())
        loop.close()


async def test_a_reply_that_takes_too_long_is_given_up_and_dropped_when_it_comes(stream):
    await stream.write(request(1, HOLD))
    with pytest.raises(DeadlineExceeded, match=r"request 1 within 0\.05 s"):
        await stream.read(1, timeout_s=0.05)
    for request_id in (2, 3):
        await stream.write(request(request_id, HOLD))
    assert [answered(await stream.read(request_id)) for request_id in (2, 3)] == [2, 3]
    await stream.write(request(4))
    assert answered(await stream.read(4)) == 4


async def test_a_forgotten_reply_leaves_no_trace(stream):
    await stream.write(request(1))
    stream.forget(1)
    await stream.write(request(2))
    assert answered(await stream.read(2)) == 2
    with pytest.raises(KeyError):
        await stream.read(1)


async def test_a_node_that_dies_fails_what_is_in_flight_in_bounded_time(stream, node):
    for request_id in (1, 2):
        await stream.write(request(request_id, HOLD))
    node.server.stop(None)
    async with asyncio.timeout(BOUNDED_S):
        for request_id in (1, 2):
            with pytest.raises(Unavailable, match=node.address):
                await stream.read(request_id)


async def test_a_stream_reconnects_when_the_node_is_back(stream, node):
    await stream.write(request(1))
    await stream.read(1)
    node.server.stop(None).wait()
    async with asyncio.timeout(BOUNDED_S):
        for request_id in (2, 3):
            with pytest.raises(Unavailable):
                await ask(stream, request_id)
    port = int(node.address.rsplit(":", 1)[1])
    restarted = Node()
    with serving(add_RetrievalServiceServicer_to_server, restarted, port):
        async with asyncio.timeout(BOUNDED_S):
            request_id = 200
            while True:
                request_id += 1
                try:
                    assert await ask(stream, request_id) == request_id
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
        assert restarted.streams == 1


async def test_an_address_where_nobody_answers_is_unavailable_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    stream = AttendStream(f"127.0.0.1:{free}")
    async with asyncio.timeout(BOUNDED_S):
        with pytest.raises(Unavailable, match=str(free)):
            await ask(stream, 1)
    await stream.close()


async def test_an_error_that_ends_the_stream_keeps_its_class_and_reason(stream):
    await stream.write(request(1, HOLD))
    await stream.write(request(2, FAIL))
    for request_id in (1, 2):
        with pytest.raises(InvalidRequest, match="layer 101 is unknown") as caught:
            await stream.read(request_id)
        assert caught.value.reason == "INVALID_REQUEST"
    await stream.write(request(3))
    assert answered(await stream.read(3)) == 3


async def test_a_stream_that_the_node_ends_is_opened_again(stream, node):
    await stream.write(request(1, END))
    with pytest.raises(Unavailable, match="ended the stream"):
        await stream.read(1)
    await stream.write(request(2))
    assert answered(await stream.read(2)) == 2
    assert node.streams == 2


async def test_bytes_in_flight_are_capped(node):
    size = request(1, HOLD).ByteSize()
    stream = AttendStream(node.address, max_in_flight_bytes=2 * size)
    for request_id in (1, 2):
        await stream.write(request(request_id, HOLD))
    third = asyncio.create_task(stream.write(request(3, HOLD)))
    assert not (await asyncio.wait([third], timeout=0.1))[0]
    stream.forget(1)
    await asyncio.wait_for(third, BOUNDED_S)
    assert answered(await stream.read(3)) == 3
    assert answered(await stream.read(2)) == 2
    await stream.close()


async def test_a_single_request_above_the_cap_is_still_sent(node):
    stream = AttendStream(node.address, max_in_flight_bytes=1)
    for request_id in (1, 2):
        await stream.write(request(request_id))
        assert answered(await stream.read(request_id)) == request_id
    await stream.close()


async def test_closing_fails_what_is_in_flight(node):
    stream = AttendStream(node.address)
    await stream.write(request(1, HOLD))
    await stream.close()
    with pytest.raises(Unavailable, match="closed here"):
        await stream.read(1)


async def test_messages_of_many_megabytes_pass_in_both_directions(stream):
    rows = rows_of(1.0, count=1 << 17)
    big = wire.attend_request(1, 0, [rows], 1.0, 0.0)
    assert 16 << 20 < big.ByteSize() < MAX_MESSAGE_BYTES
    await stream.write(big)
    (result,) = wire.attend_results_from_proto(await stream.read(1), [(1 << 17, 4)])
    np.testing.assert_array_equal(result.partial.output, rows.queries * 2)


async def test_a_reply_that_is_no_protobuf_message_is_an_error_not_a_hang():
    class Garbage(grpc.GenericRpcHandler):
        def service(self, handler_call_details):
            return grpc.stream_stream_rpc_method_handler(
                lambda requests, context: (b"\xff\xff garbage" for _ in requests)
            )

    def add(servicer, server):
        server.add_generic_rpc_handlers((servicer,))

    with serving(add, Garbage()) as (address, _):
        stream = AttendStream(address)
        async with asyncio.timeout(BOUNDED_S):
            await stream.write(request(1))
            with pytest.raises(Internal, match="cannot be read"):
                await stream.read(1)
        await stream.close()
