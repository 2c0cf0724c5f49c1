"""Mutual TLS over real gRPC: who gets in, who is reached, and rotation under traffic."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tls_material import issued, replace_trust

from longreach.errors import LongreachError, Unavailable
from longreach.rpc.authorization import AsyncAuthorization, Authorization, Policy
from longreach.rpc.channels import aio_channel, sync_channel
from longreach.rpc.health import serve_health, serve_health_async
from longreach.rpc.status import error_from_rpc
from longreach.rpc.tls import ChannelTls, open_port, peer_of
from longreach.security.authority import Authority
from longreach.security.peers import Role
from longreach.security.tls import TlsFiles

SERVICE = "test.Echo"
POLICY = Policy({SERVICE: frozenset({Role.WORKER})})
METHODS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def handlers():
    """A service that answers with its caller's name and the request."""

    def named(request, context):
        return str(peer_of(context).identity).encode() + b" " + request

    def unary_stream(request, context):
        yield named(request, context)
        yield named(request, context)

    def stream_stream(requests, context):
        for request in requests:
            yield named(request, context)

    return {
        "unary_unary": grpc.unary_unary_rpc_method_handler(named),
        "unary_stream": grpc.unary_stream_rpc_method_handler(unary_stream),
        "stream_unary": grpc.stream_unary_rpc_method_handler(
            lambda requests, context: named(b"".join(requests), context)
        ),
        "stream_stream": grpc.stream_stream_rpc_method_handler(stream_stream),
    }


def async_handlers():
    async def unary_unary(request, context):
        return str(peer_of(context).identity).encode() + b" " + request

    async def unary_stream(request, context):
        yield await unary_unary(request, context)
        yield await unary_unary(request, context)

    async def stream_unary(requests, context):
        return await unary_unary(b"".join([each async for each in requests]), context)

    async def stream_stream(requests, context):
        async for request in requests:
            yield await unary_unary(request, context)

    return {
        "unary_unary": grpc.unary_unary_rpc_method_handler(unary_unary),
        "unary_stream": grpc.unary_stream_rpc_method_handler(unary_stream),
        "stream_unary": grpc.stream_unary_rpc_method_handler(stream_unary),
        "stream_stream": grpc.stream_stream_rpc_method_handler(stream_stream),
    }


@pytest.fixture
def authority(tmp_path):
    return Authority.create(tmp_path / "pki")


@contextlib.contextmanager
def serving(files, policy=POLICY, *, ask_clients=True):
    """A blocking server; gives its TLS address and its plain one."""
    server = grpc.server(ThreadPoolExecutor(8), interceptors=[Authorization(policy)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers()),))
    serve_health(server, [SERVICE]).set(True)
    address = open_port(server, "127.0.0.1:0", files, ask_clients=ask_clients)
    plain = open_port(server, "127.0.0.1:0", None)
    server.start()
    try:
        yield address, plain
    finally:
        server.stop(0).wait()


def call(channel, kind="unary_unary", request=b"hello"):
    """One call of any kind; returns the replies."""
    method = getattr(channel, kind)(f"/{SERVICE}/{kind}")
    sent = iter([request]) if kind.startswith("stream") else request
    try:
        reply = method(sent, timeout=20)
        return list(reply) if kind.endswith("stream") else [reply]
    except grpc.RpcError as error:
        raise error_from_rpc(error, peer="peer") from None


def healthy(channel):
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    return health_pb2_grpc.HealthStub(channel).Check(request, timeout=20).status == 1


def to_node(files, name="node-0.node.longreach.internal"):
    return ChannelTls(files, lambda address: name)


@pytest.mark.parametrize("kind", METHODS)
def test_a_role_that_the_policy_names_is_let_in_and_known(kind, authority):
    worker = issued(authority, Role.WORKER, "worker-3")
    with (
        serving(issued(authority, Role.NODE, "node-0")) as (address, _),
        sync_channel(address, tls=to_node(worker)) as channel,
    ):
        assert set(call(channel, kind)) == {b"worker worker-3 hello"}


@pytest.mark.parametrize("kind", METHODS)
def test_another_role_is_refused_by_name(kind, authority):
    node = issued(authority, Role.NODE, "node-1")
    with (
        serving(issued(authority, Role.NODE, "node-0")) as (address, _),
        sync_channel(address, tls=to_node(node)) as channel,
    ):
        with pytest.raises(LongreachError, match=r"node node-1 may not call test\.Echo") as caught:
            call(channel, kind)
        assert caught.value.reason == "WRONG_ROLE"
        assert healthy(channel)


def test_a_client_without_a_certificate_is_not_let_in(authority):
    bare = TlsFiles(certificate="", key="", ca=str(authority.folder / "ca.crt"))
    with serving(issued(authority, Role.NODE, "node-0")) as (address, _):
        for tls in (to_node(bare), None):
            with sync_channel(address, tls=tls) as channel, pytest.raises(Unavailable):
                call(channel)


def test_a_certificate_of_another_authority_is_not_let_in(authority, tmp_path):
    stranger = Authority.create(tmp_path / "stranger")
    files = stranger.issue(issued(stranger, Role.WORKER, "worker-0").identity)
    intruder = TlsFiles(
        certificate=str(files.certificate),
        key=str(files.key),
        ca=str(authority.folder / "ca.crt"),
    )
    with (
        serving(issued(authority, Role.NODE, "node-0")) as (address, _),
        sync_channel(address, tls=to_node(intruder)) as channel,
        pytest.raises(Unavailable),
    ):
        call(channel)


def test_a_node_that_answers_at_anothers_address_is_not_taken_for_it(authority):
    worker = issued(authority, Role.WORKER, "worker-0")
    with serving(issued(authority, Role.NODE, "node-1")) as (address, _):
        with (
            sync_channel(address, tls=to_node(worker)) as channel,
            pytest.raises(Unavailable, match="does not name"),
        ):
            call(channel)
        with sync_channel(
            address, tls=to_node(worker, "node-1.node.longreach.internal")
        ) as channel:
            assert call(channel) == [b"worker worker-0 hello"]


def test_a_plain_port_beside_tls_answers_health_checks_and_nothing_else(authority):
    with (
        serving(issued(authority, Role.NODE, "node-0")) as (_, plain),
        sync_channel(plain) as channel,
    ):
        assert healthy(channel)
        for policy_kind in METHODS:
            with pytest.raises(LongreachError, match="needs a certificate") as caught:
                call(channel, policy_kind)
            assert caught.value.code == grpc.StatusCode.UNAUTHENTICATED.value[0]


def test_an_open_service_needs_tls_but_no_certificate(authority):
    policy = Policy({}, open_services=frozenset({SERVICE}))
    bare = TlsFiles(certificate="", key="", ca=str(authority.folder / "ca.crt"))
    files = issued(authority, Role.COORDINATOR, "coordinator-0")
    with serving(files, policy, ask_clients=False) as (address, plain):
        with sync_channel(address, tls=ChannelTls(bare)) as channel:
            assert call(channel) == [b"None hello"]
        with sync_channel(plain) as channel, pytest.raises(LongreachError, match="certificate"):
            call(channel)


def rotate(authority, tmp_path, *members):
    """Gives members certificates of an authority that the old ones do not know."""
    successor = Authority.create(tmp_path / "successor")
    for member in members:
        replace_trust(authority.folder / member, successor)


def test_new_files_are_used_for_new_calls_and_old_calls_go_on(authority, tmp_path):
    node = issued(authority, Role.NODE, "node-0")
    worker = issued(authority, Role.WORKER, "worker-0")
    frozen = issued(authority, Role.WORKER, "worker-1", clock=lambda: 0.0)
    with (
        serving(node) as (address, _),
        sync_channel(address, tls=to_node(worker), own_connection=True) as channel,
    ):
        turn = threading.Semaphore(0)

        def requests():
            for number in range(2):
                turn.acquire()
                yield b"%d" % number

        turn.release()
        running = channel.stream_stream(f"/{SERVICE}/stream_stream")(requests(), timeout=60)
        assert next(running) == b"worker worker-0 0"
        rotate(authority, tmp_path, "node-0", "worker-0")
        assert call(channel) == [b"worker worker-0 hello"]
        # The server trusts the new authority only, so that call was made with the new files.
        with (
            sync_channel(address, tls=to_node(frozen), own_connection=True) as old,
            pytest.raises(Unavailable),
        ):
            call(old)
        turn.release()
        assert list(running) == [b"worker worker-0 1"]


@contextlib.asynccontextmanager
async def serving_async(files):
    server = grpc.aio.server(interceptors=[AsyncAuthorization(POLICY)])
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, async_handlers()),)
    )
    await (await serve_health_async(server, [SERVICE])).set(True)
    address = open_port(server, "127.0.0.1:0", files)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


async def call_async(channel, kind="unary_unary", request=b"hello"):
    method = getattr(channel, kind)(f"/{SERVICE}/{kind}")
    sent = iter([request]) if kind.startswith("stream") else request
    try:
        reply = method(sent, timeout=20)
        return [each async for each in reply] if kind.endswith("stream") else [await reply]
    except grpc.RpcError as error:
        raise error_from_rpc(error, peer="peer") from None


@pytest.mark.parametrize("kind", METHODS)
async def test_an_asyncio_server_applies_the_same_policy(kind, authority):
    worker = issued(authority, Role.WORKER, "worker-3")
    client = issued(authority, Role.CLIENT, "client-0")
    async with serving_async(issued(authority, Role.NODE, "node-0")) as address:
        async with aio_channel(address, tls=to_node(worker)) as channel:
            assert set(await call_async(channel, kind)) == {b"worker worker-3 hello"}
        async with aio_channel(address, tls=to_node(client)) as channel:
            with pytest.raises(LongreachError) as caught:
                await call_async(channel, kind)
            assert caught.value.reason == "WRONG_ROLE"


async def test_asyncio_channels_rotate_and_close_what_they_leave(authority, tmp_path):
    node = issued(authority, Role.NODE, "node-0")
    worker = issued(authority, Role.WORKER, "worker-0")
    async with (
        serving_async(node) as address,
        aio_channel(address, tls=to_node(worker), own_connection=True) as channel,
    ):
        running = channel.stream_stream(f"/{SERVICE}/stream_stream")(timeout=60)
        await running.write(b"0")
        assert await running.read() == b"worker worker-0 0"
        first = channel.connection()
        rotate(authority, tmp_path, "node-0", "worker-0")
        assert await call_async(channel) == [b"worker worker-0 hello"]
        assert channel.connection() is not first
        await running.write(b"1")
        assert await running.read() == b"worker worker-0 1"
        await running.done_writing()
        assert await running.read() is grpc.aio.EOF
        await running.code()
        assert channel.replaced == 0
