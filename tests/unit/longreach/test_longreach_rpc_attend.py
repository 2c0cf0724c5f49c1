"""The Attend stream over real gRPC: replies by id, failures that end in time, reconnects."""

import asyncio
import socket
import threading
import time

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
    stream = AttendStream(node.address, asyncio.get_running_loop())
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
    return answered(await stream.submit(request(request_id)))


async def test_replies_find_the_request_they_answer_though_they_come_out_of_order(stream):
    replies = [stream.submit(request(request_id, HOLD)) for request_id in (1, 2, 3)]
    assert [answered(await reply) for reply in replies] == [1, 2, 3]


async def test_replies_can_be_awaited_in_any_order(stream):
    replies = {request_id: stream.submit(request(request_id)) for request_id in range(1, 9)}
    for request_id in (5, 1, 8, 2, 3, 7, 6, 4):
        assert answered(await replies[request_id]) == request_id


async def test_all_requests_share_one_stream(stream, node):
    for request_id in range(1, 20):
        await ask(stream, request_id)
    assert node.streams == 1


async def test_requests_of_many_tasks_are_all_answered(stream):
    numbers = list(range(1, 33))
    assert await asyncio.gather(*(ask(stream, number) for number in numbers)) == numbers


def test_the_loop_may_stand_still_between_a_request_and_its_reply(node):
    loop = asyncio.new_event_loop()
    stream = AttendStream(node.address, loop)
    try:
        assert answered(loop.run_until_complete(stream.submit(request(1)))) == 1
        assert node.received.acquire(timeout=BOUNDED_S)
        for request_id in range(2, 50):
            reply = stream.submit(request(request_id))
            until = time.monotonic() + BOUNDED_S
            while stream.unsent and time.monotonic() < until:
                loop.call_soon(loop.stop)
                loop.run_forever()
            assert node.received.acquire(timeout=BOUNDED_S)
            assert answered(loop.run_until_complete(reply)) == request_id
    finally:
        loop.run_until_complete(stream.close())
        loop.close()


async def test_a_reply_that_takes_too_long_is_given_up_and_dropped_when_it_comes(stream):
    with pytest.raises(DeadlineExceeded, match="request 1 in its time"):
        await stream.submit(request(1, HOLD), timeout_s=0.05)
    replies = [stream.submit(request(request_id, HOLD)) for request_id in (2, 3)]
    assert [answered(await reply) for reply in replies] == [2, 3]
    assert await ask(stream, 4) == 4


async def test_a_cancelled_reply_leaves_no_trace(stream):
    reply = stream.submit(request(1))
    await asyncio.sleep(0)
    reply.cancel()
    assert await ask(stream, 2) == 2
    assert reply.cancelled()


async def test_a_request_that_is_cancelled_before_it_left_is_not_sent(stream, node):
    await ask(stream, 1)
    assert node.received.acquire(timeout=BOUNDED_S)
    stream.submit(request(2)).cancel()
    assert await ask(stream, 3) == 3
    assert node.received.acquire(timeout=BOUNDED_S)
    assert not node.received.acquire(blocking=False)


async def test_a_node_that_dies_fails_what_is_in_flight_in_bounded_time(stream, node):
    replies = [stream.submit(request(request_id, HOLD)) for request_id in (1, 2)]
    await asyncio.to_thread(node.received.acquire, timeout=BOUNDED_S)
    node.server.stop(None)
    async with asyncio.timeout(BOUNDED_S):
        for reply in replies:
            with pytest.raises(Unavailable, match=node.address):
                await reply


async def test_a_stream_reconnects_when_the_node_is_back(stream, node):
    await ask(stream, 1)
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
    stream = AttendStream(f"127.0.0.1:{free}", asyncio.get_running_loop())
    async with asyncio.timeout(BOUNDED_S):
        with pytest.raises(Unavailable, match=str(free)):
            await ask(stream, 1)
    await stream.close()


async def test_an_error_that_ends_the_stream_keeps_its_class_and_reason(stream):
    replies = [stream.submit(request(1, HOLD)), stream.submit(request(2, FAIL))]
    for reply in replies:
        with pytest.raises(InvalidRequest, match="layer 101 is unknown") as caught:
            await reply
        assert caught.value.reason == "INVALID_REQUEST"
    assert await ask(stream, 3) == 3


async def test_a_stream_that_the_node_ends_is_opened_again(stream, node):
    with pytest.raises(Unavailable, match="ended the stream"):
        await stream.submit(request(1, END))
    assert await ask(stream, 2) == 2
    assert node.streams == 2


async def test_bytes_in_flight_are_capped(node):
    size = request(1, HOLD).ByteSize()
    loop = asyncio.get_running_loop()
    stream = AttendStream(node.address, loop, max_in_flight_bytes=2 * size)
    replies = [stream.submit(request(request_id, HOLD), 30.0) for request_id in (1, 2)]
    for _ in replies:
        assert await asyncio.to_thread(node.received.acquire, timeout=BOUNDED_S)
    third = stream.submit(request(3))
    # Only a reply makes room, and the node holds both until it has a third request.
    assert not (await asyncio.wait([third], timeout=0.1))[0]
    assert not node.received.acquire(blocking=False)
    node.server.stop(None)
    for reply in (*replies, third):
        with pytest.raises(Unavailable):
            await asyncio.wait_for(reply, BOUNDED_S)
    await stream.close()


async def test_a_request_that_expired_makes_room_for_the_next(node):
    size = request(1, HOLD).ByteSize()
    stream = AttendStream(node.address, asyncio.get_running_loop(), max_in_flight_bytes=size)
    late = stream.submit(request(1, HOLD), timeout_s=0.05)
    assert await asyncio.wait_for(ask(stream, 2), BOUNDED_S) == 2
    with pytest.raises(DeadlineExceeded):
        await late
    await stream.close()


async def test_a_single_request_above_the_cap_is_still_sent(node):
    stream = AttendStream(node.address, asyncio.get_running_loop(), max_in_flight_bytes=1)
    for request_id in (1, 2):
        assert await ask(stream, request_id) == request_id
    await stream.close()


async def test_closing_fails_what_is_in_flight(node):
    stream = AttendStream(node.address, asyncio.get_running_loop())
    reply = stream.submit(request(1, HOLD))
    await asyncio.sleep(0)
    await stream.close()
    with pytest.raises(Unavailable, match="closed here"):
        await reply


async def test_messages_of_many_megabytes_pass_in_both_directions(stream):
    rows = rows_of(1.0, count=1 << 17)
    big = wire.attend_request(1, 0, [rows], 1.0, 0.0)
    assert 16 << 20 < big.ByteSize() < MAX_MESSAGE_BYTES
    (result,) = wire.attend_results_from_proto(await stream.submit(big), [(1 << 17, 4)])
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
        stream = AttendStream(address, asyncio.get_running_loop())
        async with asyncio.timeout(BOUNDED_S):
            with pytest.raises(Internal, match="cannot be read"):
                await stream.submit(request(1))
        await stream.close()
