"""The Append stream: acknowledgements by callback, never a wait, never a lost entry."""

import queue
import threading
import time

import numpy as np
import pytest
from rpc_servers import Acks, serving

from longreach import wire
from longreach.errors import InvalidRequest, StaleEpoch, Unavailable
from longreach.rpc.retrieval import AppendStream
from longreach.rpc.status import map_errors
from longreach.types import AppendEntry, KvBlock
from longreach.v1 import retrieval_pb2 as pb
from longreach.v1.retrieval_pb2_grpc import (
    RetrievalServiceServicer,
    add_RetrievalServiceServicer_to_server,
)

REFUSED_EPOCH = 13


class Node(RetrievalServiceServicer):
    """Acknowledges every entry, refuses an old epoch; answers only while `open_gate` is set."""

    def __init__(self):
        self.open_gate = threading.Event()
        self.open_gate.set()
        self.received = queue.SimpleQueue()
        self.streams = 0

    @map_errors
    def Append(self, request_iterator, context):
        self.streams += 1
        context.add_callback(self.open_gate.set)
        for request in request_iterator:
            entries = [wire.append_entry_from_proto(entry) for entry in request.entries]
            self.received.put(entries)
            self.open_gate.wait()
            yield pb.AppendResponse(
                request_id=request.request_id, results=[self.result(entry) for entry in entries]
            )

    @staticmethod
    def result(entry):
        if entry.epoch == REFUSED_EPOCH:
            error = wire.error_to_proto(StaleEpoch("epoch 13 is older than 14"))
            return pb.AppendResult(handle=entry.handle, stop=999, error=error)
        return pb.AppendResult(handle=entry.handle, stop=entry.start + len(entry.token_ids))


@pytest.fixture
def node():
    servicer = Node()
    with serving(add_RetrievalServiceServicer_to_server, servicer) as (address, server):
        servicer.address, servicer.server = address, server
        yield servicer


def entry(handle, start, epoch=1, positions=1, dtype=np.float16):
    array = np.full((2, 1, positions, 4), start, dtype)
    block = KvBlock((0, 1), 0, start, array, array)
    return AppendEntry(handle, epoch, start, tuple(range(positions)), (block,))


def test_each_entry_is_acknowledged_in_order_with_its_stop(node):
    acks = Acks()
    stream = AppendStream(node.address, acks)
    for start in range(10, 20):
        stream.submit([entry(1, start), entry(2, 2 * start, positions=3)])
    stream.close()
    assert acks.told == [
        ack for start in range(10, 20) for ack in ((1, start + 1, None), (2, 2 * start + 3, None))
    ]
    assert node.streams == 1


def test_the_node_receives_what_was_submitted(node):
    stream = AppendStream(node.address, Acks())
    sent = entry(2**63 + 1, 640, epoch=7, positions=5)
    stream.submit([sent])
    (received,) = node.received.get(timeout=10)
    stream.close()
    assert (received.handle, received.epoch, received.start) == (2**63 + 1, 7, 640)
    np.testing.assert_array_equal(received.blocks[0].keys, sent.blocks[0].keys)


def test_submit_returns_while_the_node_answers_nothing(node):
    node.open_gate.clear()
    acks = Acks()
    stream = AppendStream(node.address, acks)
    started = time.monotonic()
    for start in range(50):
        stream.submit([entry(1, start, positions=64)])
    assert time.monotonic() - started < 5
    assert acks.told == []
    node.open_gate.set()
    acks.wait(50)
    stream.close()


def test_a_refused_entry_says_why_and_the_others_are_stored(node):
    acks = Acks()
    stream = AppendStream(node.address, acks)
    stream.submit([entry(1, 10), entry(2, 20, epoch=REFUSED_EPOCH), entry(3, 30)])
    told = acks.wait(3)
    stream.close()
    assert told[0] == (1, 11, None)
    assert told[2] == (3, 31, None)
    handle, stop, error = told[1]
    assert (handle, stop) == (2, 999)  # what the node says it holds, not where the entry began
    assert isinstance(error, StaleEpoch)
    assert error.message == "epoch 13 is older than 14"


def test_a_node_that_dies_gives_every_entry_in_flight_back(node):
    node.open_gate.clear()
    acks = Acks()
    stream = AppendStream(node.address, acks)
    for start in (5, 6):
        stream.submit([entry(1, start), entry(2, start)])
    node.received.get(timeout=10)
    node.server.stop(None)
    told = acks.wait(4)
    stream.close()
    assert [(handle, stop) for handle, stop, _ in told] == [(1, 5), (2, 5), (1, 6), (2, 6)]
    assert all(isinstance(error, Unavailable) for _, _, error in told)


def test_a_stream_reconnects_when_the_node_is_back(node):
    acks = Acks()
    stream = AppendStream(node.address, acks)
    stream.submit([entry(1, 5)])
    acks.wait(1)
    node.server.stop(None).wait()
    stream.submit([entry(1, 6)])
    assert isinstance(acks.wait(2)[1][2], Unavailable)
    restarted = Node()
    port = int(node.address.rsplit(":", 1)[1])
    with serving(add_RetrievalServiceServicer_to_server, restarted, port):
        deadline = time.monotonic() + 10
        count = 2
        while acks.told[-1] != (1, 7, None):
            assert time.monotonic() < deadline, acks.told
            stream.submit([entry(1, 6)])
            count += 1
            acks.wait(count)
        stream.close()


def test_an_entry_that_cannot_be_sent_is_told_why(node):
    acks = Acks()
    stream = AppendStream(node.address, acks)
    stream.submit([entry(1, 5, dtype=np.float64)])
    ((handle, stop, error),) = acks.wait(1)
    assert (handle, stop) == (1, 5)
    assert isinstance(error, InvalidRequest)
    assert "float64" in error.message
    stream.submit([entry(1, 5)])
    assert acks.wait(2)[1] == (1, 6, None)
    stream.close()


def test_a_callback_that_fails_does_not_stop_the_acknowledgements(node, caplog):
    acks = Acks()

    def fails_first(*what):
        acks(*what)
        if len(acks.told) == 1:
            raise RuntimeError("boom")

    stream = AppendStream(node.address, fails_first)
    for start in (5, 6):
        stream.submit([entry(1, start)])
    acks.wait(2)
    stream.close()
    assert "boom" in caplog.text


def test_closing_without_a_submit_and_twice_is_harmless(node):
    stream = AppendStream(node.address, Acks())
    stream.close()
    stream.close()


def test_closing_gives_up_on_a_node_that_does_not_answer(node):
    node.open_gate.clear()
    acks = Acks()
    stream = AppendStream(node.address, acks)
    stream.submit([entry(1, 5)])
    node.received.get(timeout=10)
    stream.close(timeout_s=0.1)
    assert len(acks.told) == 1
    assert acks.told[0][2] is not None
    node.open_gate.set()


def test_a_callback_may_close_the_stream(node):
    acks = Acks()

    def close_after_one(*what):
        stream.close()
        acks(*what)

    stream = AppendStream(node.address, close_after_one)
    stream.submit([entry(1, 5)])
    assert acks.wait(1) == [(1, 6, None)]
