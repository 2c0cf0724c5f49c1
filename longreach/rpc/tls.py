"""Mutual TLS of gRPC: a server's ports, a channel that follows its files, who is calling.

Python's gRPC reads a channel's certificate once. `RenewingChannel` and its asyncio twin make a new
connection for the calls that begin after the files changed; calls under way end on the old one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from longreach.errors import Unavailable
from longreach.security.peers import PeerIdentity, identity_from_names
from longreach.security.tls import TlsFiles, TlsMaterial

Options = Sequence[tuple[str, int | str]]


@dataclass(frozen=True, slots=True)
class ChannelTls:
    """What channels show, and which name the peer's certificate must carry.

    `server_name` gives that name for a host:port; None checks the host of the address itself, as
    clients outside the cluster do.
    """

    files: TlsFiles
    server_name: Callable[[str], str] | None = None


def open_port(
    server: grpc.Server | grpc.aio.Server,
    listen: str,
    files: TlsFiles | None,
    *,
    ask_clients: bool = True,
) -> str:
    """Opens a server's port, plain without files; returns its host:port.

    Clients must show a certificate of the CA unless `ask_clients` is off. Raises Unavailable when
    the address cannot be bound.
    """
    try:
        if files is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, _server_credentials(files, ask_clients))
    except RuntimeError as error:
        raise Unavailable(
            f"cannot listen on {listen}: {error}; choose a free port or 127.0.0.1:0"
        ) from None
    return f"{listen.rpartition(':')[0]}:{port}"


def _server_credentials(files: TlsFiles, ask_clients: bool) -> grpc.ServerCredentials:
    def configuration(material: TlsMaterial) -> Any:
        return grpc.ssl_server_certificate_configuration(
            [(material.key, material.certificate)], root_certificates=material.ca
        )

    first = files.current()
    used = [first.version]

    def fetch() -> Any:
        """Called by gRPC before each handshake, one at a time; None keeps what is in use."""
        material = files.current()
        if material.version == used[0]:
            return None
        used[0] = material.version
        return configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        configuration(first), fetch, require_client_authentication=ask_clients
    )


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is calling: the identity its certificate names, if any, and whether it came by TLS."""

    identity: PeerIdentity | None
    encrypted: bool


def peer_of(context: Any) -> Peer:
    """The caller, from the context of a servicer's method, blocking or asyncio."""
    properties = context.auth_context()
    names = [name.decode(errors="replace") for name in properties.get("peer_uri", ())]
    return Peer(identity_from_names(names), b"ssl" in properties.get("transport_security_type", ()))


class _Connections:
    """The current connection of a channel and the reasons to make another."""

    def __init__(
        self, address: str, options: Options, tls: ChannelTls, connect: Callable[..., Any]
    ) -> None:
        self._address = address
        self._options = list(options)
        self._tls = tls
        self._connect = connect
        self._made_for: tuple[int, str] | None = None
        self._channel: Any = None
        self._lock = threading.Lock()

    def current(self) -> tuple[Any, Any]:
        """The channel for a call that begins now, and the one it replaces or None."""
        material = self._tls.files.current()
        name = self._tls.server_name(self._address) if self._tls.server_name else ""
        with self._lock:
            if self._made_for == (material.version, name):
                return self._channel, None
            replaced, self._channel = self._channel, self._make(material, name)
            self._made_for = (material.version, name)
            return self._channel, replaced

    @property
    def last(self) -> Any:
        """The channel made last; None before the first call."""
        return self._channel

    def _make(self, material: TlsMaterial, name: str) -> Any:
        credentials = grpc.ssl_channel_credentials(
            material.ca, material.key or None, material.certificate or None
        )
        options = list(self._options)
        if name:
            options.append(("grpc.ssl_target_name_override", name))
        return self._connect(self._address, credentials, options=options)


class _Method:
    """A method of a stub, looked up on the connection that is current when a call begins."""

    def __init__(self, channel: Any, kind: str, args: tuple[Any, ...], kwargs: Any) -> None:
        self._owner = channel
        self._kind = kind
        self._args = args
        self._kwargs = kwargs
        self._resolved: tuple[Any, Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        channel = self._owner.connection()
        call = self._on(channel)(*args, **kwargs)
        self._owner.began(channel, call)
        return call

    def with_call(self, *args: Any, **kwargs: Any) -> Any:
        """The blocking stub's `with_call`."""
        return self._on(self._owner.connection()).with_call(*args, **kwargs)

    def future(self, *args: Any, **kwargs: Any) -> Any:
        """The blocking stub's `future`."""
        return self._on(self._owner.connection()).future(*args, **kwargs)

    def _on(self, channel: Any) -> Any:
        resolved = self._resolved
        if resolved is None or resolved[0] is not channel:
            method = getattr(channel, self._kind)(*self._args, **self._kwargs)
            self._resolved = resolved = (channel, method)
        return resolved[1]


class RenewingChannel(grpc.Channel):
    """A blocking channel over mutual TLS that follows its certificate files."""

    def __init__(self, address: str, options: Options, tls: ChannelTls) -> None:
        self._connections = _Connections(address, options, tls, grpc.secure_channel)

    def connection(self) -> Any:
        """The gRPC channel for a call that begins now.

        A replaced one is only let go: gRPC keeps its connection while calls are open on it.
        """
        return self._connections.current()[0]

    def began(self, channel: Any, call: Any) -> None:
        """Nothing to note: see `connection`."""

    def subscribe(self, callback: Any, try_to_connect: bool | None = False) -> None:
        """Tells about the state of the current connection only."""
        self.connection().subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        """Ends `subscribe`."""
        self.connection().unsubscribe(callback)

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """A method for a stub."""
        return _Method(self, "unary_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """A method for a stub."""
        return _Method(self, "unary_stream", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        """A method for a stub."""
        return _Method(self, "stream_unary", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        """A method for a stub."""
        return _Method(self, "stream_stream", args, kwargs)

    def close(self) -> None:
        """Ends the current connection and the calls on it."""
        if self._connections.last is not None:
            self._connections.last.close()

    def __enter__(self) -> RenewingChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncRenewingChannel(grpc.aio.Channel):
    """The same for asyncio. A replaced connection is closed when its last call has ended."""

    def __init__(self, address: str, options: Options, tls: ChannelTls) -> None:
        self._connections = _Connections(address, options, tls, grpc.aio.secure_channel)
        self._open_calls: dict[Any, int] = {}
        self._retired: set[Any] = set()

    def connection(self) -> Any:
        """The gRPC channel for a call that begins now."""
        channel, replaced = self._connections.current()
        if replaced is not None:
            self._retired.add(replaced)
            self._let_go(replaced)
        return channel

    @property
    def replaced(self) -> int:
        """How many replaced connections are kept for calls still open on them."""
        return len(self._retired)

    def began(self, channel: Any, call: Any) -> None:
        """Counts a call, so that its connection lives as long as it."""
        self._open_calls[channel] = self._open_calls.get(channel, 0) + 1
        call.add_done_callback(lambda _: self._ended(channel))

    def _ended(self, channel: Any) -> None:
        self._open_calls[channel] -= 1
        self._let_go(channel)

    def _let_go(self, channel: Any) -> None:
        if not self._open_calls.get(channel):
            self._open_calls.pop(channel, None)
            # gRPC closes a channel that nobody refers to.
            self._retired.discard(channel)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """The state of the current connection."""
        state: grpc.ChannelConnectivity = self.connection().get_state(try_to_connect)
        return state

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Waits for another state of the current connection."""
        await self.connection().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Waits until the current connection is up."""
        await self.connection().channel_ready()

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """A method for a stub."""
        return _Method(self, "unary_unary", args, kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """A method for a stub."""
        return _Method(self, "unary_stream", args, kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        """A method for a stub."""
        return _Method(self, "stream_unary", args, kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        """A method for a stub."""
        return _Method(self, "stream_stream", args, kwargs)

    async def close(self, grace: float | None = None) -> None:
        """Ends every connection and the calls on them."""
        for channel in [self._connections.last, *self._retired]:
            if channel is not None:
                await channel.close(grace)
        self._retired.clear()

    async def __aenter__(self) -> AsyncRenewingChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
