"""All outgoing calls to workers and nodes.

The rest of the coordinator names members; the driver knows their clients, follows them when they
move, and signs the capabilities they ask for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from coordinator.cluster import Heartbeat
from coordinator.repairs import Copy
from longreach import security
from longreach.errors import DeadlineExceeded, LongreachError, Unavailable
from longreach.rpc.retrieval import CONTROL_TIMEOUT_S, AsyncNodeClient
from longreach.rpc.worker import WorkerClient
from longreach.steps import PrefillProgress, StepOutcome, StepRow, WorkerStatus
from longreach.types import (
    Budget,
    CopyProgress,
    Identity,
    NodeStats,
    SessionInventory,
    SessionRecord,
    ShardInventory,
    ShardMap,
)

# How long a worker may use what it was allowed to: longer than any prefill or generation.
CAPABILITY_TTL_S = 24 * 3600.0
# How long calls on a replaced connection may take to end.
RETIRE_S = CONTROL_TIMEOUT_S
_log = logging.getLogger(__name__)
P = TypeVar("P", bound="Peer")


class Peer(Protocol):
    """A client of one member."""

    address: str

    async def close(self) -> None:
        """Ends the connection."""


class WorkerPeer(Peer, Protocol):
    """What the coordinator asks of a worker (longreach.rpc.worker.WorkerClient)."""

    def prefill(
        self,
        context_id: str,
        token_ids: Sequence[int],
        identity: Identity,
        shard_map: ShardMap,
        capability: bytes,
        shard_ids: Sequence[str] = (),
        place_capability: bytes = b"",
    ) -> AsyncIterator[PrefillProgress]:
        """Prefills a context, or some shards of it; the last progress has a summary."""

    async def open_session(
        self,
        record: SessionRecord,
        identity: Identity,
        shard_map: ShardMap,
        capability: bytes,
        budget: Budget,
        min_coverage: float,
    ) -> tuple[int, int]:
        """Makes a session ready; returns (next position, resident bytes)."""

    async def close_session(self, session_id: str, close_on_nodes: bool, epoch: int = 0) -> bool:
        """Ends a session, unless it is open under a newer epoch; whether it is open nowhere now."""

    async def step(self, rows: Sequence[StepRow], *, traceparent: str = "") -> StepOutcome:
        """Runs one decode step."""

    async def status(self) -> WorkerStatus:
        """What the worker holds."""


class NodePeer(Peer, Protocol):
    """What the coordinator asks of a node (longreach.rpc.retrieval.AsyncNodeClient)."""

    async def drop(self, context_id: str, capability: bytes) -> int:
        """Forgets a context; returns bytes freed."""

    async def drop_shards(
        self, context_id: str, shard_ids: Sequence[str], capability: bytes
    ) -> int:
        """Forgets some shards of a context; returns bytes freed."""

    def copy(
        self,
        context_id: str,
        shard_id: str,
        source_id: str,
        source_address: str,
        capability: bytes,
    ) -> AsyncIterator[CopyProgress]:
        """Copies a shard from a peer; the last progress is sealed."""

    async def close_session(self, session_id: str, capability: bytes, epoch: int = 0) -> int:
        """Ends a session by id, unless its epoch is newer; returns bytes freed."""

    async def inventory(
        self, context_id: str = ""
    ) -> tuple[list[ShardInventory], list[SessionInventory]]:
        """Shards held and sessions open."""

    async def stats(self) -> NodeStats:
        """Memory and counters."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a drop on several nodes did: bytes freed, and the nodes that did not answer."""

    bytes_freed: int
    failed: tuple[str, ...]


class Driver:
    """Clients of the members, made when first needed.

    `address_of` gives a member's current host:port; it raises for members that are unknown.
    """

    def __init__(
        self,
        address_of: Callable[[str], str],
        secret: bytes,
        *,
        worker_client: Callable[[str], WorkerPeer] = WorkerClient,
        node_client: Callable[[str], NodePeer] = AsyncNodeClient,
    ) -> None:
        self._address_of = address_of
        self._secret = secret
        self._worker_client = worker_client
        self._node_client = node_client
        self._workers: dict[str, WorkerPeer] = {}
        self._nodes: dict[str, NodePeer] = {}
        self._retired: dict[Peer, asyncio.Task[None]] = {}

    def worker(self, worker_id: str) -> WorkerPeer:
        """The client of a worker, at its current address."""
        return self._client(worker_id, self._workers, self._worker_client)

    def node(self, node_id: str) -> NodePeer:
        """The client of a node, at its current address."""
        return self._client(node_id, self._nodes, self._node_client)

    def renew(self, member_id: str) -> None:
        """Connects anew to a member at its next call: the old connection is broken, and would
        answer "unavailable" without trying until its backoff has passed."""
        for clients in (self._workers, self._nodes):
            client = clients.pop(member_id, None)
            if client is not None:
                self._retire(client)

    def write_capability(self, context_id: str, tenant: str) -> bytes:
        """Leave to put, seal and drop a context."""
        expires = time.time() + CAPABILITY_TTL_S
        return security.sign(
            security.Capability("write", tenant, context_id, expires), self._secret
        )

    def place_capability(self, context_id: str, tenant: str, epoch: int) -> bytes:
        """Leave to copy and drop shards as the map of a placement epoch wants."""
        expires = time.time() + CAPABILITY_TTL_S
        capability = security.Capability("place", tenant, context_id, expires, epoch=epoch)
        return security.sign(capability, self._secret)

    def read_capability(self, record: SessionRecord) -> bytes:
        """Leave to open a session."""
        expires = time.time() + CAPABILITY_TTL_S
        capability = security.Capability(
            "read", record.tenant, record.context_id, expires, record.session_id, record.epoch
        )
        return security.sign(capability, self._secret)

    async def close_on_node(self, node_id: str, session_id: str, epoch: int = 0) -> int:
        """Ends a session by id on a node, without its worker, unless it was taken over since
        `epoch`; returns the bytes freed."""
        expires = time.time() + CAPABILITY_TTL_S
        capability = security.Capability("close", "", "", expires, session_id)
        signed = security.sign(capability, self._secret)
        return await self.node(node_id).close_session(session_id, signed, epoch)

    async def drop(self, context_id: str, tenant: str, node_ids: Iterable[str]) -> Dropped:
        """Drops a context on several nodes at once; nodes that do not answer are named."""
        names = tuple(node_ids)
        capability = self.write_capability(context_id, tenant)
        answers = await asyncio.gather(
            *(_answer(self._drop_on(name, context_id, capability)) for name in names)
        )
        failed = tuple(
            name
            for name, answer in zip(names, answers, strict=True)
            if isinstance(answer, LongreachError)
        )
        return Dropped(sum(a for a in answers if isinstance(a, int)), failed)

    async def copy(self, copy: Copy, tenant: str, epoch: int) -> AsyncGenerator[CopyProgress, None]:
        """Has the target copy a shard from the source; ends once it is sealed.

        Raises what either node refused, Unavailable where one is lost.
        """
        capability = self.place_capability(copy.context_id, tenant, epoch)
        calls = self.node(copy.target).copy(
            copy.context_id,
            copy.shard.shard_id,
            copy.source,
            self._address_of(copy.source),
            capability,
        )
        sealed = False
        async for progress in calls:
            sealed = progress.sealed
            yield progress
        if not sealed:
            raise Unavailable(f"node {copy.target} ended the copy without sealing it")

    async def drop_shards(
        self, node_id: str, context_id: str, tenant: str, shard_ids: Sequence[str], epoch: int
    ) -> int:
        """Drops some shards of a context from a node; returns the bytes freed. Raises
        FailedPrecondition while a session over the context is open there."""
        capability = self.place_capability(context_id, tenant, epoch)
        return await self.node(node_id).drop_shards(context_id, shard_ids, capability)

    async def inventory(
        self, node_id: str
    ) -> tuple[list[ShardInventory], list[SessionInventory]] | None:
        """Every shard and every session of a node; None when it does not answer."""

        async def ask() -> tuple[list[ShardInventory], list[SessionInventory]]:
            return await self.node(node_id).inventory()

        answer = await _answer(ask())
        return None if isinstance(answer, LongreachError) else answer

    async def inventories(
        self, node_ids: Iterable[str], context_id: str = "", *, timeout_s: float = CONTROL_TIMEOUT_S
    ) -> dict[str, list[ShardInventory]]:
        """What several nodes hold; nodes that do not answer in time are left out."""
        names = tuple(node_ids)
        answers = await asyncio.gather(
            *(_answer(self._inventory_of(name, context_id), timeout_s) for name in names)
        )
        return {
            name: answer
            for name, answer in zip(names, answers, strict=True)
            if not isinstance(answer, LongreachError)
        }

    async def refreshed(self, reports: Sequence[Heartbeat], timeout_s: float) -> list[Heartbeat]:
        """Members' reports with what they say now; those that do not answer keep the old."""

        async def ask(report: Heartbeat) -> Heartbeat:
            if report.worker is not None:
                status = await self.worker(report.member_id).status()
                return dataclasses.replace(report, worker=status)
            stats = await self.node(report.member_id).stats()
            return dataclasses.replace(report, node=stats)

        answers = await asyncio.gather(*(_answer(ask(report), timeout_s) for report in reports))
        return [
            report if isinstance(answer, LongreachError) else answer
            for report, answer in zip(reports, answers, strict=True)
        ]

    async def close(self) -> None:
        """Ends every connection."""
        clients: list[Peer] = [*self._workers.values(), *self._nodes.values(), *self._retired]
        self._workers.clear()
        self._nodes.clear()
        for task in self._retired.values():
            task.cancel()
        await asyncio.gather(*(client.close() for client in clients))

    async def _drop_on(self, node_id: str, context_id: str, capability: bytes) -> int:
        return await self.node(node_id).drop(context_id, capability)

    async def _inventory_of(self, node_id: str, context_id: str) -> list[ShardInventory]:
        return (await self.node(node_id).inventory(context_id))[0]

    def _client(self, member_id: str, clients: dict[str, P], make: Callable[[str], P]) -> P:
        address = self._address_of(member_id)
        client = clients.get(member_id)
        if client is not None and client.address == address:
            return client
        if client is not None:
            self._retire(client)
        clients[member_id] = make(address)
        return clients[member_id]

    def _retire(self, client: Peer) -> None:
        """Closes a client later: calls that are still under way on it end by themselves."""

        async def close() -> None:
            await asyncio.sleep(RETIRE_S)
            await client.close()

        task = self._retired[client] = asyncio.create_task(close())
        task.add_done_callback(lambda _: self._retired.pop(client, None))


T = TypeVar("T")


async def _answer(
    call: Coroutine[Any, Any, T], timeout_s: float = CONTROL_TIMEOUT_S
) -> T | LongreachError:
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except TimeoutError:
        return DeadlineExceeded(f"a node did not answer within {timeout_s} s")
    except LongreachError as error:
        level = logging.INFO if isinstance(error, Unavailable) else logging.WARNING
        _log.log(level, "a node did not do what was asked: %s", error)
        return error
