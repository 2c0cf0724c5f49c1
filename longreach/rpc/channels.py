"""Channels and server options: explicit message limits on both sides, keepalive, quick reconnects.

Channels with equal arguments share one TCP connection, and a long message then delays every short
one behind it. `own_connection=True` gives a channel a connection of its own: Attend, ingest and
Append each have one.
"""

from __future__ import annotations

import grpc

from longreach.rpc.tls import AsyncRenewingChannel, ChannelTls, RenewingChannel

MAX_MESSAGE_BYTES = 64 << 20
"""Longest message any service sends or accepts."""

KEEPALIVE_TIME_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 10_000
"""A peer that is silent for the sum of the two while a call is open counts as gone."""

Options = list[tuple[str, int | str]]

_MESSAGE_LIMITS: Options = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
# A connection whose ping stays unanswered ends after the shorter of the two timeouts.
_KEEPALIVE: Options = [
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
]


def server_options() -> Options:
    """Options of every longreach server. A port that is taken is an error, never shared."""
    return [
        *_MESSAGE_LIMITS,
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
        *_KEEPALIVE,
    ]


def channel_options(*, own_connection: bool = False) -> Options:
    """Options of every longreach channel."""
    options: Options = [
        *_MESSAGE_LIMITS,
        *_KEEPALIVE,
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # Despite its name, how long one attempt to connect may take.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Members answer at addresses that their heartbeats name; an HTTP proxy has no part in it.
        ("grpc.enable_http_proxy", 0),
    ]
    if own_connection:
        options.append(("grpc.use_local_subchannel_pool", 1))
    return options


def sync_channel(
    address: str,
    *,
    own_connection: bool = False,
    tls: ChannelTls | None = None,
) -> grpc.Channel:
    """A channel for blocking clients and threads; plain text without `tls`."""
    options = channel_options(own_connection=own_connection)
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    return RenewingChannel(address, options, tls)


def aio_channel(
    address: str,
    *,
    own_connection: bool = False,
    tls: ChannelTls | None = None,
) -> grpc.aio.Channel:
    """A channel for asyncio; call it where the loop that will drive it runs."""
    options = channel_options(own_connection=own_connection)
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return AsyncRenewingChannel(address, options, tls)
