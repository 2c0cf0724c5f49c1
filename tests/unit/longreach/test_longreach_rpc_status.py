"""Errors through every kind of servicer method, blocking and asyncio, and health beside them."""

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from longreach import errors
from longreach.errors import ConnectionLost, Internal, LongreachError, NotFound
from longreach.rpc.channels import aio_channel, server_options, sync_channel
from longreach.rpc.health import serve_health, serve_health_async
from longreach.rpc.status import error_from_rpc, map_errors
from longreach.v1 import cluster_pb2 as pb
from longreach.v1 import retrieval_pb2
from longreach.v1.cluster_pb2_grpc import (
    ClusterServiceServicer,
    ClusterServiceStub,
    add_ClusterServiceServicer_to_server,
)
from longreach.v1.retrieval_pb2_grpc import (
    RetrievalServiceServicer,
    RetrievalServiceStub,
    add_RetrievalServiceServicer_to_server,
)

SERVICE = "longreach.v1.ClusterService"
ALL = {
    each.__name__: each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, LongreachError)
}


def raise_named(name):
    """Raises the LongreachError of that name, or a plain exception."""
    if name == "abort":
        return
    if name not in ALL:
        raise KeyError(name)
    raise ALL[name](f"this is {name}: über", retry_after_s=0.25)


class Blocking(ClusterServiceServicer, RetrievalServiceServicer):
    @map_errors
    def Leave(self, request, context):
        raise_named(request.member_id)
        context.abort(grpc.StatusCode.DATA_LOSS, "aborted by hand")

    @map_errors
    def Read(self, request, context):
        yield retrieval_pb2.ReadResponse()
        raise_named("NotFound")


class Waiting(ClusterServiceServicer, RetrievalServiceServicer):
    @map_errors
    async def Leave(self, request, context):
        raise_named(request.member_id)
        await context.abort(grpc.StatusCode.DATA_LOSS, "aborted by hand")

    @map_errors
    async def Read(self, request, context):
        yield retrieval_pb2.ReadResponse()
        raise_named("NotFound")


@contextlib.asynccontextmanager
async def server_of(kind):
    """A started blocking or asyncio server: its address and readiness switch."""
    if kind == "blocking":
        server = grpc.server(ThreadPoolExecutor(4), options=server_options())
        readiness, servicer = serve_health(server, [SERVICE]), Blocking()
    else:
        server = grpc.aio.server(options=server_options())
        readiness, servicer = await serve_health_async(server, [SERVICE]), Waiting()
    add_ClusterServiceServicer_to_server(servicer, server)
    add_RetrievalServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    started = server.start()
    if kind == "asyncio":
        await started
    yield f"127.0.0.1:{port}", readiness
    stopped = server.stop(None)
    if kind == "asyncio":
        await stopped


kinds = pytest.mark.parametrize("kind", ["blocking", "asyncio"])


async def failure_of(address, name):
    """What a call that fails with `name` raises: through an asyncio and a blocking client."""
    request = pb.LeaveRequest(member_id=name)
    async with aio_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as waiting:
            await ClusterServiceStub(channel).Leave(request, timeout=10)

    def call():
        with sync_channel(address) as channel:
            ClusterServiceStub(channel).Leave(request, timeout=10)

    with pytest.raises(grpc.RpcError) as blocking:
        await asyncio.to_thread(call)
    return waiting.value, blocking.value


@kinds
async def test_every_error_keeps_class_reason_message_and_retry_hint(kind):
    async with server_of(kind) as (address, _):
        for name, error in ALL.items():
            for raised in await failure_of(address, name):
                back = error_from_rpc(raised, peer=address)
                # A connection that the peer lost is not the caller's.
                own = errors.Unavailable if error is errors.ConnectionLost else error
                assert type(back) is own
                assert back.message == f"this is {name}: über"
                assert back.reason == error.default_reason
                assert back.retry_after_s == 0.25


@kinds
async def test_the_status_carries_google_error_details(kind):
    async with server_of(kind) as (address, _):
        for raised in await failure_of(address, "StaleEpoch"):
            assert raised.code() == grpc.StatusCode.FAILED_PRECONDITION
            info, retry = rpc_status.from_call(raised).details
            read = error_details_pb2.ErrorInfo()
            assert info.Unpack(read)
            assert (read.reason, read.domain) == ("STALE_EPOCH", "longreach")
            assert retry.Is(error_details_pb2.RetryInfo.DESCRIPTOR)


@kinds
async def test_an_unexpected_exception_is_internal_and_logged(kind, caplog):
    async with server_of(kind) as (address, _):
        for raised in await failure_of(address, "secret"):
            back = error_from_rpc(raised)
            assert type(back) is Internal
            assert "Leave failed with KeyError" in back.message
            assert "secret" not in back.message
    assert "KeyError: 'secret'" in caplog.text


@kinds
async def test_a_status_that_a_method_set_itself_is_left_alone(kind):
    async with server_of(kind) as (address, _):
        for raised in await failure_of(address, "abort"):
            assert raised.code() == grpc.StatusCode.DATA_LOSS
            assert raised.details() == "aborted by hand"
            back = error_from_rpc(raised, peer="n1:70")
            assert type(back) is LongreachError
            assert back.message == "n1:70: aborted by hand"
            assert back.reason == "DATA_LOSS"


@kinds
async def test_a_stream_that_fails_half_way_delivers_what_came_before(kind):
    async with server_of(kind) as (address, _), aio_channel(address) as channel:
        call = RetrievalServiceStub(channel).Read(retrieval_pb2.ReadRequest())
        assert await call.read() == retrieval_pb2.ReadResponse()
        with pytest.raises(grpc.RpcError) as caught:
            await call.read()
        assert type(error_from_rpc(caught.value)) is NotFound


@kinds
async def test_a_method_nobody_implements_is_an_error_that_says_so(kind):
    async with server_of(kind) as (address, _), aio_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await ClusterServiceStub(channel).Heartbeat(pb.HeartbeatRequest())
        assert error_from_rpc(caught.value).reason == "UNIMPLEMENTED"


@kinds
async def test_liveness_is_serving_and_readiness_follows_the_switch(kind):
    serving, not_serving = (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    async with server_of(kind) as (address, readiness), aio_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def status(service):
            return (await health.Check(health_pb2.HealthCheckRequest(service=service))).status

        async def turn(ready):
            result = readiness.set(ready)
            if kind == "asyncio":
                await result

        assert await status("") == serving
        assert await status(SERVICE) == not_serving
        await turn(True)
        assert await status(SERVICE) == serving
        await turn(False)
        assert await status(SERVICE) == not_serving
        assert await status("") == serving
        with pytest.raises(grpc.RpcError) as caught:
            await status("longreach.v1.Nothing")
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


@kinds
async def test_reflection_lists_the_service(kind):
    async with server_of(kind) as (address, _), aio_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        reply = await call.read()
        names = {service.name for service in reply.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names
        await call.done_writing()


def test_a_port_that_is_taken_is_an_error_and_never_shared():
    def server():
        return grpc.server(ThreadPoolExecutor(1), options=server_options())

    first = server()
    port = first.add_insecure_port("127.0.0.1:0")
    first.start()
    with pytest.raises(RuntimeError):
        server().add_insecure_port(f"127.0.0.1:{port}")
    first.stop(None)


def test_an_rpc_error_without_a_status_is_internal():
    assert type(error_from_rpc(grpc.RpcError("odd"))) is Internal


@pytest.mark.parametrize(
    ("details", "kind"),
    [
        (
            "Stream removed (Secure read failed (Unwrap failed (TSI_DATA_CORRUPTED)))",
            ConnectionLost,
        ),
        ("Exception calling application: Stream removed", LongreachError),
    ],
)
def test_a_connection_that_ends_under_a_call_is_lost_whatever_grpc_calls_it(details, kind):
    unknown = grpc.aio.AioRpcError(
        grpc.StatusCode.UNKNOWN, grpc.aio.Metadata(), grpc.aio.Metadata(), details
    )
    error = error_from_rpc(unknown, peer="host:1")
    assert type(error) is kind
    assert error.message == f"host:1: {details}"
