"""The measuring side of the RPC benchmark: decode steps' calls as a worker makes them.

One process serves one transport. It reads `NODES TOKENS` lines and answers each with one JSON line:
a list with the stage times of every token, in microseconds summed over its layers. Between two
lines it sleeps, so that transports can take turns.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from benchmarks.rpc_node import (
    HEAD_DIM,
    KV_HEADS,
    Q_HEADS,
    REPLY_BYTES,
    REQUEST_BYTES,
    receive_exactly,
)
from longreach import wire
from longreach.attention import merge
from longreach.errors import LongreachError
from longreach.rpc.retrieval import AttendStream
from longreach.types import AttendResult, AttendRows, Budget, PartialAttention, Span

LAYERS = 32
READ_TIMEOUT_S = 30.0
Stages = dict[str, float]


class StreamSteps:
    """Every node is asked for every head of every layer; replies merge with the worker's part."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._loop = asyncio.new_event_loop()
        self._streams = [AttendStream(address) for address in addresses]
        self._last_id = 0
        rng = np.random.default_rng(0)
        queries = rng.standard_normal((1, Q_HEADS, HEAD_DIM)).astype(ml_dtypes.bfloat16)
        self._rows = AttendRows(1, 0, KV_HEADS, Span(128, 65536), Budget(top_k=100), queries)
        output = rng.standard_normal(queries.shape).astype(np.float32)
        self._resident = PartialAttention(output, np.zeros((1, Q_HEADS), np.float32))

    def token(self, nodes: int) -> Stages:
        """The stages of one token over the first `nodes` nodes, microseconds."""
        sums: Stages = {}
        for layer in range(LAYERS):
            for name, seconds in self._layer(layer, self._streams[:nodes]).items():
                sums[name] = sums.get(name, 0.0) + seconds * 1e6
        return sums

    def _layer(self, layer: int, streams: Sequence[AttendStream]) -> Stages:
        began = time.perf_counter()
        self._last_id += 1
        request = wire.attend_request(self._last_id, layer, [self._rows], HEAD_DIM**-0.5, 0.0)
        run = self._loop.run_until_complete

        async def write_all() -> None:
            for stream in streams:
                await stream.write(request)

        async def collect_all() -> list[object]:
            return [await stream.read(self._last_id, READ_TIMEOUT_S) for stream in streams]

        run(write_all())
        sent = time.perf_counter()
        replies = run(collect_all())
        collected = time.perf_counter()
        parts = [self._part(reply) for reply in replies]
        decoded = time.perf_counter()
        merge([self._resident, *parts])
        merged = time.perf_counter()
        slowest = max(
            (wire.node_timing_from_proto(reply) for reply in replies),  # type: ignore[arg-type]
            key=lambda timing: timing.total_s,
        )
        return {
            "send": sent - began,
            "queue": slowest.queue_s,
            "search": slowest.search_s,
            "attend": slowest.attend_s,
            "node_merge": slowest.merge_s,
            "transport": collected - sent - slowest.total_s,
            "decode": decoded - collected,
            "merge": merged - decoded,
            "total": merged - began,
        }

    @staticmethod
    def _part(reply: object) -> PartialAttention:
        (result,) = wire.attend_results_from_proto(reply, [(1, Q_HEADS)])  # type: ignore[arg-type]
        if isinstance(result, LongreachError):
            raise result
        assert isinstance(result, AttendResult)
        return result.partial


class SocketSteps:
    """The same bytes over plain sockets: the floor under any RPC."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._sockets = [self._connect(address) for address in addresses]
        self._request = bytes(REQUEST_BYTES)
        self._buffer = bytearray(REPLY_BYTES)

    @staticmethod
    def _connect(address: str) -> socket.socket:
        host, port = address.rsplit(":", 1)
        connection = socket.create_connection((host, int(port)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def token(self, nodes: int) -> Stages:
        """The time of one token over the first `nodes` nodes, microseconds."""
        began = time.perf_counter()
        for _ in range(LAYERS):
            for connection in self._sockets[:nodes]:
                connection.sendall(self._request)
            for connection in self._sockets[:nodes]:
                if not receive_exactly(connection, self._buffer):
                    raise ConnectionError("the floor process is gone")
        return {"total": (time.perf_counter() - began) * 1e6}


def serve(token: Callable[[int], Stages]) -> None:
    """Answers measuring orders until stdin ends; the first token of a turn only warms caches."""
    for line in sys.stdin:
        nodes, tokens = map(int, line.split())
        token(nodes)
        print(json.dumps([token(nodes) for _ in range(tokens)]), flush=True)


if __name__ == "__main__":
    kinds: dict[str, Callable[[Sequence[str]], StreamSteps | SocketSteps]]
    kinds = {"stream": StreamSteps, "floor": SocketSteps}
    serve(kinds[sys.argv[1]](sys.argv[2:]).token)
