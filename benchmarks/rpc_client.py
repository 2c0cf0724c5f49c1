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
import torch

from benchmarks.rpc_node import (
    HEAD_DIM,
    KV_HEADS,
    Q_HEADS,
    REPLY_BYTES,
    REQUEST_BYTES,
    receive_exactly,
)
from gpu_worker.asks import NodeSession
from gpu_worker.attention import Partial, merge
from gpu_worker.fanout import FanOut
from gpu_worker.methods.base import SessionQueries
from gpu_worker.routes import plan_route
from longreach.attention import merge as merge_parts
from longreach.types import Budget, LayerGeometry, Shard, ShardMap, Span

LAYERS = 32
CONTEXT_TOKENS = 65_536
READ_TIMEOUT_S = 30.0
WARM_UP_TOKENS = 5
"""Tokens at the start of a turn that are not counted: a worker in the middle of an answer has its
code in the caches, a process that slept through the others' turns has not."""
Stages = dict[str, float]


class StreamSteps:
    """The worker's own fan-out; replies merge with the worker's part as in a step.

    With n nodes each holds a span of the context, so every node is asked for every head.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        layers = [
            LayerGeometry(layer, Q_HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM) for layer in range(LAYERS)
        ]
        self._fanout = FanOut(layers, asyncio.new_event_loop())
        for nodes in range(1, len(addresses) + 1):
            self._fanout.attach(str(nodes), _session(addresses[:nodes], layers))
        rng = np.random.default_rng(0)
        self._queries = rng.standard_normal((1, Q_HEADS, HEAD_DIM)).astype(ml_dtypes.bfloat16)
        self._resident = Partial(torch.randn(1, Q_HEADS, HEAD_DIM), torch.zeros(1, Q_HEADS))

    def token(self, nodes: int) -> Stages:
        """The stages of one token over the first `nodes` nodes, microseconds."""
        sums: Stages = {}
        for layer in range(LAYERS):
            for name, seconds in self._layer(layer, nodes).items():
                sums[name] = sums.get(name, 0.0) + seconds * 1e6
        return sums

    def _layer(self, layer: int, nodes: int) -> Stages:
        asked = SessionQueries(
            str(nodes), self._queries, Span(128, CONTEXT_TOKENS - 512), Budget(top_k=100)
        )
        began = time.perf_counter()
        deadline = time.monotonic() + READ_TIMEOUT_S
        flight = self._fanout.send(layer, [asked], HEAD_DIM**-0.5, 0.0, deadline)
        sent = time.perf_counter()
        collected = flight.collect()
        received = time.perf_counter()
        (answer,) = collected.answers
        if answer.error is not None:
            raise answer.error
        retrieved = merge_parts([part.partial for part in answer.parts])
        part = Partial(torch.from_numpy(retrieved.output), torch.from_numpy(retrieved.lse))
        merge(self._resident, part)
        merged = time.perf_counter()
        slowest = collected.slowest
        return {
            "send": sent - began,
            "queue": slowest.queue_s,
            "search": slowest.search_s,
            "attend": slowest.attend_s,
            "node_merge": slowest.merge_s,
            "transport": received - sent - slowest.total_s,
            "merge": merged - received,
            "total": merged - began,
        }


def _session(addresses: Sequence[str], layers: Sequence[LayerGeometry]) -> NodeSession:
    nodes = {f"node-{number}": address for number, address in enumerate(addresses)}
    cuts = [CONTEXT_TOKENS * number // len(nodes) for number in range(len(nodes) + 1)]
    shards = tuple(
        Shard(node, Span(start, stop), tuple(range(LAYERS)), 0, KV_HEADS, (node,))
        for node, start, stop in zip(nodes, cuts, cuts[1:], strict=False)
    )
    route = plan_route(ShardMap(shards, nodes, "benchmark"), layers, CONTEXT_TOKENS)
    return NodeSession(route, dict.fromkeys(nodes, 1))


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
    """Answers measuring orders until stdin ends; the first tokens of a turn only warm caches."""
    for line in sys.stdin:
        nodes, tokens = map(int, line.split())
        for _ in range(WARM_UP_TOKENS):
            token(nodes)
        print(json.dumps([token(nodes) for _ in range(tokens)]), flush=True)


if __name__ == "__main__":
    kinds: dict[str, Callable[[Sequence[str]], StreamSteps | SocketSteps]]
    kinds = {"stream": StreamSteps, "floor": SocketSteps}
    serve(kinds[sys.argv[1]](sys.argv[2:]).token)
