"""A coordinator behind mutual TLS: members are whom their certificates name."""

from __future__ import annotations

import contextlib
import socket

import pytest
from coordinator_doubles import FakeWorker

from coordinator.config import CoordinatorConfig
from coordinator.server import CoordinatorServer
from longreach.errors import LongreachError
from longreach.rpc.channels import aio_channel
from longreach.rpc.membership import MemberReport, report_to_proto
from longreach.rpc.status import error_from_rpc
from longreach.rpc.tls import ChannelTls
from longreach.security.authority import Authority
from longreach.security.peers import PeerIdentity, Role
from longreach.security.tls import TlsFiles
from longreach.v1 import cluster_pb2, generation_pb2, retrieval_pb2
from longreach.v1.cluster_pb2_grpc import ClusterServiceStub
from longreach.v1.generation_pb2_grpc import GenerationServiceStub


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "pki")


def files_of(authority, role, member_id):
    files = authority.issue(PeerIdentity(role, member_id))
    return TlsFiles(certificate=str(files.certificate), key=str(files.key), ca=str(files.ca))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.asynccontextmanager
async def coordinator(authority, **settings):
    config = CoordinatorConfig(listen="127.0.0.1:0", cluster_secret="s", **settings)
    server = CoordinatorServer(config, files_of(authority, Role.COORDINATOR, "coordinator-0"))
    address = await server.start()
    try:
        yield address
    finally:
        await server.stop()


def node_report(member_id):
    node = retrieval_pb2.StatsResponse()
    return cluster_pb2.HeartbeatRequest(
        member_id=member_id, incarnation=1, address="127.0.0.1:1", node=node
    )


async def ask(call):
    try:
        return await call
    except Exception as error:
        raise error_from_rpc(error) from None


async def test_a_node_reports_and_leaves_under_its_own_name_only(authority):
    tls = ChannelTls(files_of(authority, Role.NODE, "node-0"))
    async with coordinator(authority) as address, aio_channel(address, tls=tls) as channel:
        stub = ClusterServiceStub(channel)
        assert (await stub.Heartbeat(node_report("node-0"))).epoch == 1
        for call in (
            stub.Heartbeat(node_report("node-1")),
            stub.Leave(cluster_pb2.LeaveRequest(member_id="node-1", incarnation=1)),
        ):
            with pytest.raises(LongreachError, match="that of node node-0") as caught:
                await ask(call)
            assert caught.value.reason == "WRONG_MEMBER"
        await stub.Leave(cluster_pb2.LeaveRequest(member_id="node-0", incarnation=1))


async def test_a_node_cannot_report_as_a_worker(authority):
    tls = ChannelTls(files_of(authority, Role.NODE, "node-0"))
    status = FakeWorker({}).status()
    report = report_to_proto(MemberReport("node-0", 1, "127.0.0.1:1", "h", "z", 1, worker=status))
    async with coordinator(authority) as address, aio_channel(address, tls=tls) as channel:
        with pytest.raises(LongreachError, match="cannot report as worker 'node-0'") as caught:
            await ask(ClusterServiceStub(channel).Heartbeat(report))
        assert caught.value.reason == "WRONG_MEMBER"
        status = await GenerationServiceStub(channel).GetStatus(generation_pb2.GetStatusRequest())
        assert not status.members


async def test_a_client_asks_but_does_not_report(authority):
    tls = ChannelTls(files_of(authority, Role.CLIENT, "client"))
    async with coordinator(authority) as address, aio_channel(address, tls=tls) as channel:
        await GenerationServiceStub(channel).GetStatus(generation_pb2.GetStatusRequest())
        with pytest.raises(LongreachError) as caught:
            await ask(ClusterServiceStub(channel).Heartbeat(node_report("client")))
        assert caught.value.reason == "WRONG_ROLE"


async def test_with_a_port_for_members_the_public_one_asks_for_no_certificate(authority):
    inner = f"127.0.0.1:{free_port()}"
    bare = ChannelTls(TlsFiles(certificate="", key="", ca=str(authority.folder / "ca.crt")))
    own = ChannelTls(files_of(authority, Role.NODE, "node-0"))
    async with coordinator(authority, cluster_listen=inner) as address:
        async with aio_channel(address, tls=bare) as channel:
            await GenerationServiceStub(channel).GetStatus(generation_pb2.GetStatusRequest())
            with pytest.raises(LongreachError, match="needs a certificate"):
                await ask(ClusterServiceStub(channel).Heartbeat(node_report("node-0")))
        async with aio_channel(inner, tls=own) as channel:
            await ClusterServiceStub(channel).Heartbeat(node_report("node-0"))
        async with aio_channel(inner, tls=bare) as channel:
            with pytest.raises(LongreachError):
                await ask(ClusterServiceStub(channel).Heartbeat(node_report("node-0")))
