"""Real retrieval nodes on loopback gRPC, in this process, and shard maps over them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from gpu_worker.config import WorkerConfig
from gpu_worker.engine import Engine
from gpu_worker.model import Model
from gpu_worker.offload import Destination
from longreach.security import Capability, sign
from longreach.steps import PrefillProgress, StepOutcome, StepRow
from longreach.types import (
    Budget,
    Identity,
    SamplingParams,
    SessionRecord,
    Shard,
    ShardMap,
    Span,
)
from retrieval_node.__main__ import build_store
from retrieval_node.config import NodeConfig
from retrieval_node.server import start_server
from retrieval_node.store import Store

SECRET = "a secret of the tests"
_contexts = itertools.count(1)


@dataclass
class Node:
    """A real node: its store and its server."""

    store: Store
    server: grpc.Server
    address: str

    def stop(self) -> None:
        self.server.stop(0).wait()


def start_node() -> Node:
    config = NodeConfig(
        cluster_secret=SECRET, memory_limit_bytes=256 << 20, index_kind="flat", attend_threads=1
    )
    store = build_store(config)
    server, address, readiness = start_server(store, "127.0.0.1:0", 64)
    readiness.set(True)
    return Node(store, server, address)


@dataclass
class Cluster:
    """Nodes and one engine over them."""

    model: Model
    nodes: dict[str, Node]
    config: WorkerConfig
    engines: list[Engine] = field(default_factory=list)

    def engine(self) -> Engine:
        engine = Engine(self.model, self.config)
        engine.start()
        self.engines.append(engine)
        return engine

    def shard_map(self, tokens: int, policy: str = "layer") -> ShardMap:
        shards = _POLICIES[policy](self.model, tokens, tuple(self.nodes))
        return ShardMap(shards, {name: node.address for name, node in self.nodes.items()}, policy)

    def destination(
        self, tokens: int, policy: str = "layer", identity: Identity | None = None
    ) -> Destination:
        context_id = f"ctx-{next(_contexts):032x}"
        capability = Capability("write", "", context_id, time.time() + 600)
        return Destination(
            context_id,
            identity or self.model.info.identity,
            self.shard_map(tokens, policy),
            sign(capability, SECRET.encode()),
        )

    def prefill(self, engine: Engine, tokens: Sequence[int], policy: str = "layer") -> Destination:
        to = self.destination(len(tokens), policy, engine.info.identity)
        progress = list(engine.prefill(to, tokens, threading.Event()))
        assert progress[-1].summary is not None
        return to

    def open(
        self,
        engine: Engine,
        to: Destination,
        stop: int,
        session_id: str = "s",
        epoch: int = 1,
        min_coverage: float = 1.0,
        sampling: SamplingParams | None = None,
        known: Sequence[int] = (),
    ) -> tuple[int, int]:
        record = SessionRecord(
            session_id,
            to.context_id,
            stop,
            "",
            epoch,
            tuple(known),
            sampling=sampling or SamplingParams(),
        )
        capability = Capability("read", "", to.context_id, time.time() + 600, session_id, epoch)
        return engine.open_session(
            record,
            to.identity,
            to.shard_map,
            sign(capability, SECRET.encode()),
            Budget(exact=True),
            min_coverage,
        )


def feed(
    engine: Engine, position: int, tokens: Sequence[int], session_id: str = "s"
) -> StepOutcome:
    return engine.step([StepRow(session_id, position, tuple(tokens), True, 5)])


@contextmanager
def cluster(model: Model, nodes: int = 2, **config: Any) -> Iterator[Cluster]:
    settings: dict[str, Any] = {
        "sink_tokens": 8,
        "window_tokens": 40,
        "max_row_tokens": 32,
        "max_sessions": 3,
        "prefill_chunk_tokens": 128,
        "prefill_pattern": "dense",
        "append_timeout_ms": 1000,
        "cluster_secret": SECRET,
        **config,
    }
    found = Cluster(model, {f"n{i}": start_node() for i in range(nodes)}, WorkerConfig(**settings))
    try:
        yield found
    finally:
        for engine in found.engines:
            engine.stop()
        for node in found.nodes.values():
            node.stop()
            node.store.close()


def last_progress(progress: Iterator[PrefillProgress]) -> PrefillProgress:
    *_, last = progress
    return last


def _by_layer(model: Model, tokens: int, nodes: tuple[str, ...]) -> tuple[Shard, ...]:
    heads = model.layers[0].kv_heads
    return tuple(
        Shard(
            f"layers-{i}",
            Span(0, tokens),
            tuple(layer.layer for layer in model.layers if layer.layer % len(nodes) == i),
            0,
            heads,
            (node,),
        )
        for i, node in enumerate(nodes)
    )


def _by_span_and_head(model: Model, tokens: int, nodes: tuple[str, ...]) -> tuple[Shard, ...]:
    every = tuple(layer.layer for layer in model.layers)
    middle = tokens // 2 // 64 * 64
    return tuple(
        Shard(f"{span}-{head}", span, every, head, head + 1, (nodes[(i + head) % len(nodes)],))
        for i, span in enumerate((Span(0, middle), Span(middle, tokens)))
        for head in range(model.layers[0].kv_heads)
    )


def _replicated(model: Model, tokens: int, nodes: tuple[str, ...]) -> tuple[Shard, ...]:
    every = tuple(layer.layer for layer in model.layers)
    return (Shard("all", Span(0, tokens), every, 0, model.layers[0].kv_heads, nodes),)


def _replicated_heads(model: Model, tokens: int, nodes: tuple[str, ...]) -> tuple[Shard, ...]:
    every = tuple(layer.layer for layer in model.layers)
    return tuple(
        Shard(f"head-{head}", Span(0, tokens), every, head, head + 1, nodes)
        for head in range(model.layers[0].kv_heads)
    )


def close_capability(session_id: str) -> bytes:
    """Leave to close a session by its id."""
    return sign(Capability("close", "", "", time.time() + 600, session_id), SECRET.encode())


_POLICIES = {
    "replicated_heads": _replicated_heads,
    "layer": _by_layer,
    "span_and_head": _by_span_and_head,
    "replicated": _replicated,
}
