"""The coordinator's client of a GPU worker."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Sequence

import grpc

from longreach import wire
from longreach.rpc.channels import MAX_MESSAGE_BYTES, aio_channel
from longreach.rpc.reply_stream import ReplyStream
from longreach.rpc.status import error_from_rpc
from longreach.rpc.tls import ChannelTls
from longreach.steps import PrefillProgress, StepOutcome, StepRow, WorkerStatus
from longreach.telemetry import scope
from longreach.types import Budget, Identity, SessionRecord, ShardMap
from longreach.v1 import worker_pb2 as pb
from longreach.v1.worker_pb2_grpc import WorkerServiceStub

CONTROL_TIMEOUT_S = 30.0
"""Longest a control call may take."""
OPEN_TIMEOUT_S = 120.0
"""Longest opening a session may take: the resident set is read back."""


class WorkerClient:
    """One worker, for the coordinator's event loop; create it where that loop runs.

    Every method raises LongreachErrors: the worker's own, or Unavailable and DeadlineExceeded.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = CONTROL_TIMEOUT_S,
        tls: ChannelTls | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._channel = aio_channel(address, own_connection=True, tls=tls)
        self._stub = WorkerServiceStub(self._channel)
        self._step_ids = itertools.count(1)
        self._steps: ReplyStream[pb.StepRequest, pb.StepResponse] = ReplyStream(
            self._stub.Step,
            lambda response: response.step_id,
            asyncio.get_running_loop(),
            peer=address,
            max_in_flight_bytes=MAX_MESSAGE_BYTES,
        )

    async def prefill(
        self,
        context_id: str,
        token_ids: Sequence[int],
        identity: Identity,
        shard_map: ShardMap,
        capability: bytes,
        shard_ids: Sequence[str] = (),
        place_capability: bytes = b"",
    ) -> AsyncIterator[PrefillProgress]:
        """Prefills a context and offloads its KV; yields progress, the last with a summary.

        With `shard_ids` only those shards of a stored context; `token_ids` ends where they do.

        Closing the iterator (or cancelling the task in it) cancels the prefill on the worker.
        """
        call = self._stub.Prefill(
            pb.PrefillRequest(
                context_id=context_id,
                token_ids=token_ids,
                identity=wire.identity_to_proto(identity),
                shard_map=wire.shard_map_to_proto(shard_map),
                capability=capability,
                shard_ids=list(shard_ids),
                place_capability=place_capability,
                traceparent=scope.traceparent(),
            )
        )
        try:
            async for response in call:
                yield wire.prefill_progress_from_proto(response)
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None
        finally:
            call.cancel()

    async def open_session(
        self,
        record: SessionRecord,
        identity: Identity,
        shard_map: ShardMap,
        capability: bytes,
        budget: Budget,
        min_coverage: float = 1.0,
    ) -> tuple[int, int]:
        """Makes a session ready; returns where its next row starts and its resident bytes."""
        request = pb.WorkerServiceOpenSessionRequest(
            record=wire.session_record_to_proto(record),
            identity=wire.identity_to_proto(identity),
            shard_map=wire.shard_map_to_proto(shard_map),
            capability=capability,
            budget=wire.budget_to_proto(budget),
            min_coverage=min_coverage,
            traceparent=scope.traceparent(),
        )
        try:
            response = await self._stub.OpenSession(request, timeout=OPEN_TIMEOUT_S)
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None
        return response.stop, response.resident_bytes

    async def close_session(
        self, session_id: str, close_on_nodes: bool = True, epoch: int = 0
    ) -> bool:
        """Ends a session on the worker and, when asked, on its nodes, unless it is open under a
        newer epoch than a given one; whether it was open and is so nowhere now that was to be
        closed."""
        request = pb.WorkerServiceCloseSessionRequest(
            session_id=session_id, close_on_nodes=close_on_nodes, epoch=epoch
        )
        try:
            return (await self._stub.CloseSession(request, timeout=self._timeout_s)).closed
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None

    async def step(
        self, rows: Sequence[StepRow], timeout_s: float = math.inf, *, traceparent: str = ""
    ) -> StepOutcome:
        """Feeds the rows in one step; results in their order. `traceparent` is that of the step's
        span where the step is traced.

        Steps may be sent before earlier ones are answered. Raises Unavailable when the stream
        broke: whether the worker made the step is then unknown, and its sessions must be opened
        again.
        """
        step_id = next(self._step_ids)
        request = pb.StepRequest(
            step_id=step_id,
            rows=[wire.step_row_to_proto(row) for row in rows],
            traceparent=traceparent,
        )
        return wire.step_outcome_from_proto(await self._steps.submit(step_id, request, timeout_s))

    async def status(self) -> WorkerStatus:
        """What the worker is and what it holds."""
        try:
            response = await self._stub.Status(pb.StatusRequest(), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from None
        return wire.worker_status_from_proto(response)

    async def close(self) -> None:
        """Ends the connection and every call on it."""
        await self._steps.close()
        await self._channel.close()
