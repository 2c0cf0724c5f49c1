"""A real coordinator server on loopback, with a worker and two nodes that are doubles."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from coordinator_doubles import SECRET, FakeNode, FakeWorker, serve_double

from coordinator.config import CoordinatorConfig
from coordinator.server import CoordinatorServer
from longreach.errors import LongreachError
from longreach.rpc.channels import aio_channel
from longreach.rpc.membership import MemberReport, report_to_proto
from longreach.rpc.status import error_from_rpc
from longreach.v1 import cluster_pb2, cluster_pb2_grpc, generation_pb2_grpc
from longreach.v1 import generation_pb2 as pb

BEAT_S = 0.2


@dataclass
class Reply:
    """What a generation returned."""

    token_ids: list[int]
    text: str
    summary: Any


@dataclass
class World:
    """A coordinator, its doubles, and the calls that the tests make."""

    config: CoordinatorConfig
    nodes: dict[str, FakeNode]
    workers: dict[str, FakeWorker]
    server: CoordinatorServer | None = None
    stub: Any = None
    silent: set[str] = field(default_factory=set)
    incarnations: dict[str, int] = field(default_factory=dict)
    _channel: Any = None
    _beats: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serves, and registers every member."""
        for double in (*self.nodes.values(), *self.workers.values()):
            if double.server is None:
                serve_double(double)
        self.server = CoordinatorServer(self.config)
        self.address = await self.server.start()
        self._channel = aio_channel(self.address)
        self.stub = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)
        await self.beat()
        self._beats = asyncio.create_task(self._beat_on())

    async def stop(self) -> None:
        """Ends the coordinator; the doubles go on."""
        assert self._beats is not None
        assert self.server is not None
        self._beats.cancel()
        await asyncio.wait([self._beats])
        await self._channel.close()
        await self.server.stop()

    def stop_doubles(self) -> None:
        """Ends workers and nodes."""
        for double in (*self.nodes.values(), *self.workers.values()):
            assert double.server is not None
            double.server.stop(0)

    async def beat(self) -> None:
        """Every member that is not silent reports once."""
        for name, node in self.nodes.items():
            if name not in self.silent:
                await self._cluster.Heartbeat(
                    report_to_proto(self._report(name, node.address, node=node.stats()))
                )
        for name, worker in self.workers.items():
            if name not in self.silent:
                await self._cluster.Heartbeat(
                    report_to_proto(self._report(name, worker.address, worker=worker.status()))
                )

    async def leave(self, name: str) -> None:
        """A member takes leave."""
        self.silent.add(name)
        incarnation = self.incarnations.get(name, 1)
        await self._cluster.Leave(cluster_pb2.LeaveRequest(member_id=name, incarnation=incarnation))

    def _report(self, name: str, address: str, **kind: Any) -> MemberReport:
        return MemberReport(name, self.incarnations.get(name, 1), address, "h", "z", 4, **kind)

    async def _beat_on(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await self.beat()

    async def create(self, token_ids: Sequence[int], **options: Any) -> list[Any]:
        """Stores a context of token ids; every progress message."""
        requests = [
            pb.CreateContextRequest(options=pb.CreateContextOptions(**options)),
            pb.CreateContextRequest(tokens=pb.TokenIds(ids=token_ids)),
        ]
        return [reply async for reply in self.stub.CreateContext(_stream(requests))]

    async def context(self, token_ids: Sequence[int], **options: Any) -> Any:
        """Stores a context and returns it as it stood at the end."""
        return (await self.create(token_ids, **options))[-1].context

    async def generate(self, token_ids: Sequence[int] = (), **fields: Any) -> Reply:
        """Generates to the end."""
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=token_ids), **fields)
        tokens: list[Any] = []
        summary: Any = None
        async for reply in self.stub.Generate(request):
            tokens.extend(reply.tokens)
            summary = reply.summary if reply.HasField("summary") else summary
        return Reply([t.token_id for t in tokens], "".join(t.text for t in tokens), summary)


async def _stream(requests: Sequence[Any]) -> AsyncIterator[Any]:
    for request in requests:
        yield request


@contextlib.asynccontextmanager
async def running_world(world: World) -> AsyncGenerator[World, None]:
    """Starts a world and ends its coordinator; the doubles go on."""
    await world.start()
    try:
        yield world
    finally:
        await world.stop()


def new_world(**settings: Any) -> World:
    """A world of two nodes and a worker."""
    nodes = {name: FakeNode(name) for name in ("node-0", "node-1")}
    fields = {
        "listen": "127.0.0.1:0",
        "cluster_secret": SECRET,
        "drain_grace_s": 5.0,
        "failover_patience_s": 1.0,
        "replicas": 1,  # so that what one node loses is lost
    }
    return World(CoordinatorConfig(**(fields | settings)), nodes, {"worker-0": FakeWorker(nodes)})


@pytest.fixture
async def world() -> AsyncGenerator[World, None]:
    made = new_world()
    async with running_world(made):
        yield made
    made.stop_doubles()


async def raised(call: Awaitable[Any]) -> LongreachError:
    """The error a call raises, as a client sees it."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return error_from_rpc(caught.value)


async def eventually(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Waits until a condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
