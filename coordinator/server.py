"""gRPC of the coordinator: decode, call, encode, and nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from coordinator import cluster
from coordinator.catalog.base import ContextRecord
from coordinator.cluster import Heartbeat, Leave
from coordinator.config import CoordinatorConfig
from coordinator.coordinator import Coordinator
from coordinator.generation import Token
from coordinator.index_progress import IndexSummary
from coordinator.requests import GenerateParams, NewContext, Prompt, Resume
from coordinator.summary import Summary
from longreach import wire
from longreach.errors import InvalidRequest, PermissionDenied
from longreach.rpc.authorization import AsyncApiKeys, AsyncAuthorization, Policy
from longreach.rpc.channels import server_options
from longreach.rpc.health import AsyncReadiness, serve_health_async
from longreach.rpc.membership import HEARTBEAT_INTERVAL_S, report_from_proto
from longreach.rpc.status import map_errors
from longreach.rpc.tls import open_port, peer_of
from longreach.security.api_keys import ApiKeys
from longreach.security.peers import Role
from longreach.security.tls import TlsFiles
from longreach.types import SamplingParams, Shard
from longreach.v1 import cluster_pb2, cluster_pb2_grpc, generation_pb2, generation_pb2_grpc

if TYPE_CHECKING:
    from coordinator.gateway.http import Gateway

GENERATION = "longreach.v1.GenerationService"
CLUSTER = "longreach.v1.ClusterService"
Call = grpc.aio.ServicerContext[Any, Any]


class CoordinatorServer:
    """A coordinator behind a gRPC port, with health and reflection.

    The services are ready, in the sense of grpc.health.v1, while a worker and a node are alive and
    draining has not begun. Heartbeats and requests that need no worker are answered before.
    """

    def __init__(self, config: CoordinatorConfig, files: TlsFiles | None = None) -> None:
        self._config = config
        self._files = files
        keys = ApiKeys(config.api_keys_file)
        guards: list[grpc.aio.ServerInterceptor] = []
        if files:
            guards.append(AsyncAuthorization(_policy(config)))
        if config.api_keys_file:
            guards.append(AsyncApiKeys(keys, frozenset({GENERATION})))
        self._server = grpc.aio.server(interceptors=guards, options=server_options())
        self._readiness: AsyncReadiness | None = None
        self.coordinator = Coordinator(config, files=files, on_ready=self._set_ready)
        self._keys = keys
        self.gateway: Gateway | None = None

    async def start(self) -> str:
        """Begins to serve; returns host:port. Raises Unavailable when the port cannot be had."""
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationServicer(self.coordinator, self._config), self._server
        )
        cluster_pb2_grpc.add_ClusterServiceServicer_to_server(
            ClusterServicer(self.coordinator, claims_checked=self._files is not None), self._server
        )
        self._readiness = await serve_health_async(self._server, [GENERATION, CLUSTER])
        address = self._open_ports()
        await self.coordinator.start()
        await self._server.start()
        if self._config.http_listen:
            from coordinator.gateway.opening import open_gateway  # costs 0.3 s to import

            self.gateway = await open_gateway(
                self._config, self.coordinator, self._keys, self._files
            )
        return address

    def _open_ports(self) -> str:
        config, files = self._config, self._files
        one_port = not config.cluster_listen
        address = open_port(self._server, config.listen, files, ask_clients=one_port)
        if not one_port:
            open_port(self._server, config.cluster_listen, files)
        if config.health_listen:
            open_port(self._server, config.health_listen, None)
        return address

    async def stop(self) -> None:
        """Drains, then ends every call."""
        await self.coordinator.drain()
        if self.gateway is not None:
            await self.gateway.stop()
        await self._server.stop(grace=1.0)
        await self.coordinator.close()

    async def _set_ready(self, ready: bool) -> None:
        if self._readiness is not None:
            await self._readiness.set(ready)


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """The public service."""

    def __init__(self, coordinator: Coordinator, config: CoordinatorConfig) -> None:
        self._coordinator = coordinator
        self._config = config

    @map_errors
    async def CreateContext(  # noqa: N802
        self,
        requests: AsyncIterator[generation_pb2.CreateContextRequest],
        call: Call,
    ) -> AsyncIterator[generation_pb2.CreateContextResponse]:
        """Stores a context."""
        new_context = dataclasses.replace(
            await _new_context(requests, self._config.max_context_bytes),
            traceparent=_traceparent(call),
        )
        async with contextlib.aclosing(self._coordinator.contexts.create(new_context)) as progress:
            async for each in progress:
                yield generation_pb2.CreateContextResponse(
                    context=_context(each.record), found=each.found
                )

    @map_errors
    async def GetContext(  # noqa: N802
        self, request: generation_pb2.GetContextRequest, call: Call
    ) -> generation_pb2.GetContextResponse:
        """One context."""
        view = await self._coordinator.contexts.view(request.context_id)
        return generation_pb2.GetContextResponse(
            context=_context(view.record, view.index, view.under_replicated)
        )

    @map_errors
    async def ListContexts(  # noqa: N802
        self, request: generation_pb2.ListContextsRequest, call: Call
    ) -> generation_pb2.ListContextsResponse:
        """All contexts."""
        views = await self._coordinator.contexts.views()
        return generation_pb2.ListContextsResponse(
            contexts=[_context(view.record, view.index, view.under_replicated) for view in views]
        )

    @map_errors
    async def DeleteContext(  # noqa: N802
        self, request: generation_pb2.DeleteContextRequest, call: Call
    ) -> generation_pb2.DeleteContextResponse:
        """Forgets a context."""
        freed = await self._coordinator.contexts.delete(request.context_id)
        return generation_pb2.DeleteContextResponse(bytes_freed=freed)

    @map_errors
    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, call: Call
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        """Generates tokens."""
        params = _generate_params(request, _traceparent(call))
        async with contextlib.aclosing(self._coordinator.sessions.generate(params)) as events:
            async for event in events:
                yield _generate_response(params.request_id, event)

    @map_errors
    async def GetStatus(  # noqa: N802
        self, request: generation_pb2.GetStatusRequest, call: Call
    ) -> generation_pb2.GetStatusResponse:
        """Members, memory and load."""
        status = await self._coordinator.status()
        return generation_pb2.GetStatusResponse(
            members=[_member(member, status.now) for member in status.members],
            epoch=status.epoch,
            contexts=status.contexts,
            running=status.running,
            waiting=status.waiting,
            models=status.models,
            version=status.version,
            segments_under_replicated=status.segments_under_replicated,
            reprefill_tokens=status.reprefill_tokens,
        )


class ClusterServicer(cluster_pb2_grpc.ClusterServiceServicer):
    """The membership service."""

    def __init__(self, coordinator: Coordinator, *, claims_checked: bool) -> None:
        self._coordinator = coordinator
        self._claims_checked = claims_checked

    @map_errors
    async def Heartbeat(  # noqa: N802
        self, request: cluster_pb2.HeartbeatRequest, call: Call
    ) -> cluster_pb2.HeartbeatResponse:
        """A member lives."""
        report = report_from_proto(request)
        self._check_claim(report.member_id, Role.WORKER if report.worker else Role.NODE, call)
        reply = self._coordinator.heartbeat(
            Heartbeat(
                member_id=report.member_id,
                incarnation=report.incarnation,
                address=report.address,
                host=report.host,
                zone=report.zone,
                cores=report.cores,
                worker=report.worker,
                node=report.node,
                draining=report.draining,
            )
        )
        return cluster_pb2.HeartbeatResponse(
            epoch=reply.epoch,
            interval_ms=int(HEARTBEAT_INTERVAL_S * 1000),
            drain=reply.drain,
            may_leave=reply.may_leave,
        )

    @map_errors
    async def Leave(  # noqa: N802
        self, request: cluster_pb2.LeaveRequest, call: Call
    ) -> cluster_pb2.LeaveResponse:
        """A member takes leave."""
        self._check_claim(request.member_id, None, call)
        epoch = self._coordinator.leave(Leave(request.member_id, request.incarnation))
        return cluster_pb2.LeaveResponse(epoch=epoch)

    @map_errors
    async def DrainNode(  # noqa: N802
        self, request: cluster_pb2.DrainNodeRequest, call: Call
    ) -> AsyncIterator[cluster_pb2.DrainNodeResponse]:
        """Empties a node."""
        drain = self._coordinator.drain_node(request.node_id, request.timeout_s or math.inf)
        async with contextlib.aclosing(drain) as progress:
            async for left in progress:
                yield cluster_pb2.DrainNodeResponse(
                    shards_left=left.shards,
                    bytes_left=left.bytes,
                    sessions=left.sessions,
                    empty=not left.shards,
                    stuck=left.stuck,
                )

    @map_errors
    async def RebuildCatalog(  # noqa: N802
        self, request: cluster_pb2.RebuildCatalogRequest, call: Call
    ) -> cluster_pb2.RebuildCatalogResponse:
        """Restores the catalog from the nodes."""
        rebuilt = await self._coordinator.contexts.settling.rebuild()
        return cluster_pb2.RebuildCatalogResponse(
            found_context_ids=rebuilt.found,
            contexts=rebuilt.contexts,
            node_ids=rebuilt.answered,
            silent_node_ids=rebuilt.silent,
        )

    def _check_claim(self, member_id: str, role: Role | None, call: Call) -> None:
        """Raises PermissionDenied unless the member is whom its certificate names."""
        if not self._claims_checked:
            return
        identity = peer_of(call).identity
        if identity is None or (member_id, role or identity.role) != (
            identity.member_id,
            identity.role,
        ):
            raise PermissionDenied(
                f"the certificate is that of {identity}; it cannot report as "
                f"{role.value if role else 'member'} {member_id!r}: start the member with its own "
                "certificate",
                reason="WRONG_MEMBER",
            )


def _policy(config: CoordinatorConfig) -> Policy:
    """Who may call a coordinator where TLS is on."""
    public = frozenset({GENERATION}) if config.cluster_listen else frozenset()
    roles = {
        CLUSTER: frozenset({Role.WORKER, Role.NODE}),
        f"{CLUSTER}/RebuildCatalog": frozenset({Role.CLIENT}),
        f"{CLUSTER}/DrainNode": frozenset({Role.CLIENT}),
    }
    return Policy(roles, open_services=public)


# Decoding.


async def _new_context(
    requests: AsyncIterator[generation_pb2.CreateContextRequest], bytes_max: int
) -> NewContext:
    """Reads a CreateContext stream to its end; the size is checked as it grows."""
    options = generation_pb2.CreateContextOptions()
    texts: list[str] = []
    token_ids: list[int] = []
    size, parts = 0, 0
    async for request in requests:
        kind = request.WhichOneof("part")
        if kind == "options":
            if parts:
                raise InvalidRequest("options must be the first message of the stream, once")
            options = request.options
        elif kind == "text":
            texts.append(request.text)
            size += len(request.text.encode())
        elif kind == "tokens":
            token_ids.extend(request.tokens.ids)
            size += 4 * len(request.tokens.ids)
        parts += 1
        if size > bytes_max:
            raise InvalidRequest(
                f"the context is longer than {bytes_max} bytes; split it, or start the "
                "coordinator with a larger --max-context-bytes",
                reason="TOO_LONG",
            )
    if texts and token_ids:
        raise InvalidRequest("text and token ids are mixed in one context; send one kind")
    prompt = Prompt(token_ids=tuple(token_ids)) if token_ids else Prompt(text="".join(texts))
    return NewContext(prompt, options.model, options.name, options.placement, options.replicas)


def _traceparent(call: Call) -> str:
    """The caller's W3C trace context; empty where it sent none."""
    return next((str(v) for k, v in call.invocation_metadata() or () if k == "traceparent"), "")


def _generate_params(request: generation_pb2.GenerateRequest, traceparent: str) -> GenerateParams:
    by_ids = request.WhichOneof("prompt") == "tokens"
    return GenerateParams(
        prompt=Prompt(token_ids=tuple(request.tokens.ids)) if by_ids else Prompt(request.text),
        model=request.model,
        context_id=request.context_id,
        sampling=(
            wire.sampling_from_proto(request.sampling)
            if request.HasField("sampling")
            else SamplingParams()
        ),
        max_tokens=request.max_tokens,
        stop_texts=tuple(request.stop_texts),
        ignore_eos=request.ignore_eos,
        budget=wire.budget_from_proto(request.budget) if request.HasField("budget") else None,
        min_coverage=request.min_coverage,
        top_logprobs=request.top_logprobs,
        request_id=request.request_id or f"req-{secrets.token_hex(8)}",
        resume=(
            Resume(request.resume.key, request.resume.attempt, tuple(request.resume.token_ids))
            if request.HasField("resume")
            else None
        ),
        traceparent=traceparent,
    )


# Encoding.


def _context(
    record: ContextRecord,
    index: IndexSummary | None = None,
    under_replicated: Sequence[Shard] = (),
) -> generation_pb2.Context:
    index = index or IndexSummary()
    return generation_pb2.Context(
        context_id=record.context_id,
        name=record.name,
        model=record.identity.model,
        state=generation_pb2.ContextState.Value(f"CONTEXT_STATE_{record.state.name}"),
        tokens=record.tokens,
        kv_bytes=record.kv_bytes,
        prefill_fraction=record.prefill_fraction,
        index_fraction=index.fraction,
        index_kind=index.kind,
        index_bytes=index.bytes,
        index_error=index.error,
        created_at=record.created_at,
        prefill_s=record.prefill_s,
        shard_map=wire.shard_map_to_proto(record.shard_map),
        error=record.error,
        replicas=record.replicas,
        shards_under_replicated=len(under_replicated),
    )


def _generate_response(
    request_id: str, event: tuple[Token, ...] | Summary
) -> generation_pb2.GenerateResponse:
    if isinstance(event, Summary):
        return generation_pb2.GenerateResponse(request_id=request_id, summary=_summary(event))
    return generation_pb2.GenerateResponse(
        request_id=request_id, tokens=[_token(token) for token in event]
    )


def _token(token: Token) -> generation_pb2.GeneratedToken:
    return generation_pb2.GeneratedToken(
        token_id=token.token_id,
        text=token.text,
        logprob=token.logprob,
        alternatives=[
            generation_pb2.AlternativeToken(token_id=token_id, logprob=logprob)
            for token_id, logprob in token.alternatives
        ],
    )


def _summary(summary: Summary) -> generation_pb2.GenerateSummary:
    steps = summary.steps
    return generation_pb2.GenerateSummary(
        finish_reason=generation_pb2.FinishReason.Value(
            f"FINISH_REASON_{summary.finish_reason.name}"
        ),
        usage=generation_pb2.Usage(
            context_tokens=summary.context_tokens,
            prompt_tokens=summary.prompt_tokens,
            completion_tokens=summary.completion_tokens,
        ),
        timing=generation_pb2.GenerationTiming(
            queue_s=summary.queue_s,
            open_s=summary.open_s,
            first_token_s=summary.first_token_s,
            per_token_s=summary.per_token_s,
            send_s=steps.send_s,
            local_s=steps.local_s,
            wait_s=steps.wait_s,
            merge_s=steps.merge_s,
            node_s=steps.node_s,
            sample_s=steps.sample_s,
        ),
        work=wire.work_to_proto(summary.work),
        prompt_work=wire.work_to_proto(summary.prompt_work),
        coverage=summary.coverage,
        resident_kv_bytes=summary.resident_kv_bytes,
        full_kv_bytes=summary.full_kv_bytes,
        worker_id=summary.worker_id,
        index_kinds=summary.index_kinds,
        failovers=summary.failovers,
        recomputed_tokens=summary.recomputed_tokens,
        hedged_requests=summary.hedged_requests,
        resumed=summary.resumed,
    )


def _member(member: cluster.Member, now: float) -> generation_pb2.Member:
    report = member.report
    message = generation_pb2.Member(
        member_id=report.member_id,
        kind="worker" if report.worker else "node",
        address=report.address,
        state="draining" if member.draining and member.reachable else member.state.value,
        age_s=now - member.seen_at,
    )
    if report.worker:
        message.used_bytes = report.worker.resident_used_bytes
        message.limit_bytes = report.worker.resident_capacity_bytes
        message.sessions = report.worker.sessions
        message.detail = report.worker.model.model
    elif report.node:
        node = report.node
        message.used_bytes = node.context_bytes + node.index_bytes + node.tail_bytes
        message.limit_bytes = node.memory_limit_bytes
        message.sessions = node.sessions
        message.detail = node.isa
    return message
