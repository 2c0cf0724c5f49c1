"""Processes that the RPC benchmark measures: a node that computes nothing, and a raw TCP floor.

`python -m benchmarks.rpc_node zero` serves RetrievalService.Attend as a node does, decoding and
checking every message, and answers zeros of the right shape. `floor` reads REQUEST_BYTES from a
plain socket and writes REPLY_BYTES, which is the least any RPC can take.
"""

from __future__ import annotations

import functools
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

from longreach import wire
from longreach.process import announce, wait_for_stop
from longreach.rpc.channels import server_options
from longreach.rpc.status import map_errors
from longreach.types import AttendResult, PartialAttention, WorkFigures
from longreach.v1 import retrieval_pb2 as pb
from longreach.v1.retrieval_pb2_grpc import (
    RetrievalServiceServicer,
    add_RetrievalServiceServicer_to_server,
)

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
"""Attention of Llama 3 8B."""
REQUEST_BYTES = Q_HEADS * HEAD_DIM * 2
"""Queries of one token and layer, bfloat16."""
REPLY_BYTES = Q_HEADS * HEAD_DIM * 4
"""Partial outputs of one token and layer, float32."""


class ZeroNode(RetrievalServiceServicer):
    """Answers Attend with attention over no keys."""

    @map_errors
    def Attend(  # noqa: N802
        self, request_iterator: Iterator[pb.AttendRequest], context: Any
    ) -> Iterator[pb.AttendResponse]:
        """One reply for each request, in order."""
        for request in request_iterator:
            arrived = time.perf_counter()
            rows = wire.attend_rows_from_proto(request)
            started = time.perf_counter()
            results = [_zeros(*each.queries.shape) for each in rows]
            finished = time.perf_counter()
            timing = wire.NodeTiming(queue_s=started - arrived, attend_s=finished - started)
            shapes = [each.queries.shape for each in rows]
            yield wire.attend_response(request.request_id, results, shapes, timing)


@functools.cache
def _zeros(count: int, q_heads: int, value_dim: int) -> AttendResult:
    partial = PartialAttention(
        np.zeros((count, q_heads, value_dim), np.float32),
        np.full((count, q_heads), -np.inf, np.float32),
    )
    return AttendResult(partial, WorkFigures(), "zero")


def serve_zero() -> None:
    """Serves a ZeroNode until told to stop."""
    server = grpc.server(ThreadPoolExecutor(8), options=server_options())
    add_RetrievalServiceServicer_to_server(ZeroNode(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    announce(f"127.0.0.1:{port}")
    wait_for_stop(exit_with_parent=True)
    server.stop(None)


def serve_floor() -> None:
    """Answers connections on a plain socket one after another until the client is gone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        announce(f"127.0.0.1:{server.getsockname()[1]}")
        connection, _ = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = bytearray(REQUEST_BYTES)
        reply = bytes(REPLY_BYTES)
        with connection:
            while receive_exactly(connection, buffer):
                connection.sendall(reply)


def receive_exactly(connection: socket.socket, buffer: bytearray) -> bool:
    """Fills the buffer; False when the peer closed first."""
    rest = memoryview(buffer)
    while rest:
        received = connection.recv_into(rest)
        if received == 0:
            return False
        rest = rest[received:]
    return True


if __name__ == "__main__":
    {"zero": serve_zero, "floor": serve_floor}[sys.argv[1]]()
