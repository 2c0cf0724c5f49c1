"""Tiny workers and nodes for the coordinator's tests: real gRPC servers, no model, no KV.

The worker "samples" by a rule that the tests can compute themselves; the node only keeps the list
of shards it was told about.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import grpc

from longreach import security, wire
from longreach.errors import NotFound, Unavailable
from longreach.rpc.channels import server_options
from longreach.rpc.status import map_errors
from longreach.steps import (
    ModelInfo,
    PrefillProgress,
    PrefillSummary,
    StepOutcome,
    StepRow,
    StepRowResult,
    StepTiming,
    WorkerStatus,
)
from longreach.types import (
    Identity,
    IndexStatus,
    LayerGeometry,
    NodeStats,
    SessionRecord,
    Shard,
    ShardInventory,
    WorkFigures,
)
from longreach.v1 import retrieval_pb2, retrieval_pb2_grpc, worker_pb2, worker_pb2_grpc

SECRET = "a secret for tests"
VOCAB = 256
MAX_POSITIONS = 4096
LAYERS = tuple(LayerGeometry(layer, 4, 2, 8, 8) for layer in range(4))


def model_info(**changes: Any) -> ModelInfo:
    """A model of four layers over a byte vocabulary."""
    fields: dict[str, Any] = {
        "model": "tiny",
        "revision": "rev-1",
        "identity": Identity("tiny", "rev-1", "float32"),
        "layers": LAYERS,
        "max_positions": MAX_POSITIONS,
        "vocab_size": VOCAB,
        "source": "/nowhere/tiny",
        "eos_ids": (0,),
    }
    return ModelInfo(**(fields | changes))


def next_token(session_tokens: list[int]) -> int:
    """The token after these: never 0, which ends a generation."""
    return 1 + (sum(session_tokens) * 7 + len(session_tokens)) % (VOCAB - 1)


def answer(tokens: list[int], count: int) -> list[int]:
    """The tokens a session over `tokens` generates."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(tokens) - count :]


@dataclass
class FakeNode(retrieval_pb2_grpc.RetrievalServiceServicer):
    """Keeps the shards it was told about."""

    node_id: str
    limit_bytes: int = 1 << 30
    shards: dict[str, dict[str, tuple[Shard, Identity, bool]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    dropped: list[str] = field(default_factory=list)
    session_ids: list[str] = field(default_factory=list)
    index_error: str = ""
    address: str = ""
    server: grpc.Server | None = None

    def hold(self, context_id: str, shard: Shard, identity: Identity, sealed: bool) -> None:
        """Takes a shard."""
        self.shards[context_id][shard.shard_id] = (shard, identity, sealed)

    def stats(self) -> NodeStats:
        """An empty node's statistics."""
        return NodeStats(self.limit_bytes, 0, 0, 0, 0, 0, 0, WorkFigures(), "numpy")

    @map_errors
    def Stats(self, request: Any, context: Any) -> Any:
        return wire.node_stats_to_proto(self.stats())

    @map_errors
    def Drop(self, request: Any, context: Any) -> Any:
        security.verify(
            request.capability,
            SECRET.encode(),
            now=time.time(),
            action="write",
            context_id=request.context_id,
        )
        self.dropped.append(request.context_id)
        held = self.shards.pop(request.context_id, {})
        return retrieval_pb2.DropResponse(bytes_freed=100 * len(held))

    @map_errors
    def CloseSession(self, request: Any, context: Any) -> Any:
        security.verify(
            request.capability,
            SECRET.encode(),
            now=time.time(),
            action="close",
            context_id="",
            session_id=request.session_id,
        )
        if request.session_id in self.session_ids:
            self.session_ids.remove(request.session_id)
        return retrieval_pb2.CloseSessionResponse(bytes_freed=1)

    @map_errors
    def Inventory(self, request: Any, context: Any) -> Any:
        found = [
            ShardInventory(
                context_id, shard, identity, sealed, 1, 100,
                IndexStatus("flat", "flat", 2, 2, 7, error=self.index_error), False,
            )
            for context_id, shards in self.shards.items()
            for shard, identity, sealed in shards.values()
            if request.context_id in ("", context_id)
        ]  # fmt: skip
        return retrieval_pb2.InventoryResponse(
            shards=[wire.shard_inventory_to_proto(item) for item in found],
            session_ids=self.session_ids,
            sessions=[
                retrieval_pb2.SessionInventory(
                    session_id=each, coordinator_id=each.removeprefix("ses-").rpartition("-")[0]
                )
                for each in self.session_ids
            ],
        )


@dataclass
class FakeSession:
    """What the worker remembers of a session."""

    tokens: list[int]
    stop: int
    epoch: int = 0


@dataclass
class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """Answers steps with `next_token`; every call leaves a trace."""

    nodes: dict[str, FakeNode]
    model: ModelInfo = field(default_factory=model_info)
    max_sessions: int = 4
    max_row_tokens: int = 32
    contexts: dict[str, list[int]] = field(default_factory=dict)
    sessions: dict[str, FakeSession] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)
    records: list[SessionRecord] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    closes_nodes: bool = True
    steps: list[list[StepRow]] = field(default_factory=list)
    prefills: int = 0
    cancelled_prefills: int = 0
    prefill_gate: threading.Event = field(default_factory=threading.Event)
    step_gate: threading.Event = field(default_factory=threading.Event)
    frozen: threading.Event = field(default_factory=threading.Event)
    fail_opens: int = 0
    nodes_hold: int = 0
    fail_rows_of: set[str] = field(default_factory=set)
    address: str = ""
    server: grpc.Server | None = None

    def __post_init__(self) -> None:
        self.prefill_gate.set()
        self.step_gate.set()

    def status(self) -> WorkerStatus:
        """The status it reports."""
        return WorkerStatus(
            self.model, "cpu", self.max_sessions, len(self.sessions), self.max_row_tokens,
            128, 512, 1000, 100 * len(self.sessions), 0,
        )  # fmt: skip

    @map_errors
    def Prefill(self, request: Any, context: Any) -> Iterator[Any]:
        security.verify(
            request.capability,
            SECRET.encode(),
            now=time.time(),
            action="write",
            context_id=request.context_id,
        )
        self.prefills += 1
        identity = wire.identity_from_proto(request.identity)
        shard_map = wire.shard_map_from_proto(request.shard_map)
        tokens = list(request.token_ids)
        for shard in shard_map.shards:
            for node_id in shard.node_ids:
                self.nodes[node_id].hold(request.context_id, shard, identity, False)
        yield wire.prefill_progress_to_proto(PrefillProgress(1, 4, 1, len(tokens), 0.25))
        while not self.prefill_gate.wait(0.01):
            if not context.is_active():
                self.cancelled_prefills += 1
                return
        for shard in shard_map.shards:
            for node_id in shard.node_ids:
                self.nodes[node_id].hold(request.context_id, shard, identity, True)
        self.contexts[request.context_id] = tokens
        summary = PrefillSummary(0.1, 0.2, 1000, 0, {})
        yield wire.prefill_progress_to_proto(
            PrefillProgress(4, 4, len(tokens), len(tokens), 1.0, summary)
        )

    @map_errors
    def OpenSession(self, request: Any, context: Any) -> Any:
        if self.fail_opens:
            self.fail_opens -= 1
            raise Unavailable("node-0 does not answer")
        record = wire.session_record_from_proto(request.record)
        self.records.append(record)
        security.verify(
            request.capability,
            SECRET.encode(),
            now=time.time(),
            action="read",
            context_id=record.context_id,
            session_id=record.session_id,
        )
        tokens = self.contexts[record.context_id] if record.context_id else []
        held = [*tokens[: record.context_stop], *record.known_ids[: self.nodes_hold]]
        self.sessions[record.session_id] = FakeSession(held, len(held), record.epoch)
        self.opened.append(record.session_id)
        return worker_pb2.WorkerServiceOpenSessionResponse(stop=len(held), resident_bytes=4096)

    @map_errors
    def CloseSession(self, request: Any, context: Any) -> Any:
        self.closed.append(request.session_id)
        session = self.sessions.get(request.session_id)
        # Opened anew under a newer epoch meanwhile: a real worker leaves that alone too.
        if session is not None and 0 < request.epoch < session.epoch:
            return worker_pb2.WorkerServiceCloseSessionResponse(closed=False)
        was_open = self.sessions.pop(request.session_id, None) is not None
        return worker_pb2.WorkerServiceCloseSessionResponse(closed=was_open and self.closes_nodes)

    @map_errors
    def Step(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            rows = [wire.step_row_from_proto(row) for row in request.rows]
            self.steps.append(rows)
            while not self.step_gate.wait(0.01):
                if not context.is_active():
                    return
            outcome = StepOutcome(
                tuple(self._row(row) for row in rows),
                StepTiming(total_s=0.01, send_s=0.001, wait_s=0.002, node_s=0.0015),
            )
            yield wire.step_outcome_to_proto(outcome, request.step_id)

    @map_errors
    def Status(self, request: Any, context: Any) -> Any:
        while self.frozen.is_set() and context.is_active():
            time.sleep(0.01)
        return wire.worker_status_to_proto(self.status())

    def _row(self, row: StepRow) -> StepRowResult:
        session = self.sessions.get(row.session_id)
        if session is None or row.session_id in self.fail_rows_of:
            return StepRowResult(row.session_id, error=NotFound(f"session {row.session_id}"))
        assert row.position == session.stop, (row.position, session.stop)
        session.tokens.extend(row.token_ids)
        session.stop += len(row.token_ids)
        return StepRowResult(
            row.session_id,
            token_id=next_token(session.tokens) if row.sample else None,
            logprob=-0.5,
            work=WorkFigures(keys_in_scope=10, keys_scanned=2, keys_covered=10),
            acknowledged_stop=session.stop,
        )


def serve_double(double: FakeNode | FakeWorker) -> None:
    """Starts a double on a loopback port."""
    server = grpc.server(futures.ThreadPoolExecutor(16), options=server_options())
    if isinstance(double, FakeNode):
        retrieval_pb2_grpc.add_RetrievalServiceServicer_to_server(double, server)
    else:
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(double, server)
    double.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    double.server = server
    server.start()
