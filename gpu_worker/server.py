"""The gRPC face of a worker: decode, call the engine, encode. Nothing else."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from gpu_worker.engine import Engine
from gpu_worker.offload import Destination
from longreach import wire
from longreach.errors import InvalidRequest
from longreach.rpc.authorization import Authorization, Policy
from longreach.rpc.channels import server_options
from longreach.rpc.health import Readiness, serve_health
from longreach.rpc.status import map_errors
from longreach.rpc.tls import open_port
from longreach.security.peers import Role
from longreach.security.tls import TlsFiles
from longreach.steps import StepOutcome, StepRowResult, StepTiming
from longreach.telemetry import scope, tracing
from longreach.v1 import worker_pb2 as pb
from longreach.v1.worker_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server

log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["WorkerService"].full_name
POLICY = Policy({SERVICE_NAME: frozenset({Role.COORDINATOR})})
"""Who may call a worker where TLS is on."""
SERVER_THREADS = 64
"""Concurrent RPCs; an open Step stream or a running Prefill takes one."""


class WorkerServer(WorkerServiceServicer):
    """Answers the RPCs of a worker from its engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @map_errors
    def Prefill(  # noqa: N802
        self, request: pb.PrefillRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.PrefillResponse]:
        """Prefills a context; a caller that goes away cancels it."""
        cancelled = threading.Event()
        if not context.add_callback(cancelled.set):
            cancelled.set()
        to = Destination(
            request.context_id,
            wire.identity_from_proto(request.identity),
            wire.shard_map_from_proto(request.shard_map),
            request.capability,
            frozenset(request.shard_ids),
            request.place_capability,
        )
        with (
            scope.entered(context_id=request.context_id),
            tracing.part("prefill", request.traceparent),
        ):
            for progress in self._engine.prefill(to, tuple(request.token_ids), cancelled):
                yield wire.prefill_progress_to_proto(progress)

    @map_errors
    def OpenSession(  # noqa: N802
        self, request: pb.WorkerServiceOpenSessionRequest, context: grpc.ServicerContext
    ) -> pb.WorkerServiceOpenSessionResponse:
        """Opens a session on its nodes and reads its resident set back."""
        record = wire.session_record_from_proto(request.record)
        with (
            scope.entered(session_id=record.session_id, context_id=record.context_id),
            tracing.part("open session on nodes", request.traceparent),
        ):
            stop, resident_bytes = self._engine.open_session(
                record,
                wire.identity_from_proto(request.identity),
                wire.shard_map_from_proto(request.shard_map),
                request.capability,
                wire.budget_from_proto(request.budget),
                request.min_coverage,
            )
        return pb.WorkerServiceOpenSessionResponse(stop=stop, resident_bytes=resident_bytes)

    @map_errors
    def CloseSession(  # noqa: N802
        self, request: pb.WorkerServiceCloseSessionRequest, context: grpc.ServicerContext
    ) -> pb.WorkerServiceCloseSessionResponse:
        """Ends a session here and, when asked, on its nodes."""
        with scope.entered(session_id=request.session_id):
            closed = self._engine.close_session(
                request.session_id, request.close_on_nodes, request.epoch
            )
        return pb.WorkerServiceCloseSessionResponse(closed=closed)

    @map_errors
    def Step(  # noqa: N802
        self, request_iterator: Iterator[pb.StepRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.StepResponse]:
        """Decode steps, answered in order."""
        for request in request_iterator:
            try:
                rows = [wire.step_row_from_proto(row) for row in request.rows]
            except InvalidRequest as error:
                # Told in the results: a status would end the stream for every session.
                refused = (StepRowResult(row.session_id, error=error) for row in request.rows)
                outcome = StepOutcome(tuple(refused), StepTiming())
            else:
                outcome = self._engine.step(rows, request.traceparent)
            yield wire.step_outcome_to_proto(outcome, request.step_id)

    @map_errors
    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:  # noqa: N802
        """What the worker is and what it holds."""
        return wire.worker_status_to_proto(self._engine.status())


def start_server(
    engine: Engine, listen: str, files: TlsFiles | None = None, health_listen: str = ""
) -> tuple[grpc.Server, str, Readiness]:
    """Starts to answer on `listen`; returns the server, its host:port and the readiness switch.

    With `files` by mutual TLS, and health checks in plain text on `health_listen` if given. Raises
    Unavailable when an address cannot be bound.
    """
    server = grpc.server(
        ThreadPoolExecutor(SERVER_THREADS, thread_name_prefix="rpc"),
        interceptors=[Authorization(POLICY)] if files else [],
        options=server_options(),
        maximum_concurrent_rpcs=SERVER_THREADS,
    )
    add_WorkerServiceServicer_to_server(WorkerServer(engine), server)
    readiness = serve_health(server, (SERVICE_NAME,))
    address = open_port(server, listen, files)
    if files and health_listen:
        open_port(server, health_listen, None)
    server.start()
    return server, address, readiness
