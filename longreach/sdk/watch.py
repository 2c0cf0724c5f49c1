"""Signs of life of a coordinator while a call to it is silent: a call may be long, a frozen or
cut-off coordinator would keep it waiting for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from longreach.sdk.retries import LOOK_AFTER_S, LOOK_TIMEOUT_S

_DEAD = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def lives(channel: grpc.Channel) -> bool:
    """Whether the server at the channel's end answers a health check, whatever it says."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        stub.Check(health_pb2.HealthCheckRequest(), timeout=LOOK_TIMEOUT_S)
    except grpc.RpcError as error:
        return error.code() not in _DEAD
    return True


async def lives_async(channel: grpc.aio.Channel) -> bool:
    """The same for an asyncio channel."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=LOOK_TIMEOUT_S)
    except grpc.aio.AioRpcError as error:
        return error.code() not in _DEAD
    return True


class Watch:
    """Cancels a blocking call while its reader waits and its coordinator gives no sign of life.

    Use it as a context manager around each wait; `stop` it at the call's end.
    """

    def __init__(self, channel: grpc.Channel, cancel: Callable[[], object]) -> None:
        self.lost = False
        self._channel = channel
        self._cancel = cancel
        self._waits = 0
        self._waiting = False
        self._stopped = threading.Event()
        threading.Thread(target=self._look_on, name="coordinator-watch", daemon=True).start()

    def __enter__(self) -> Watch:
        self._waits += 1
        self._waiting = True
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting = False

    def stop(self) -> None:
        """Ends the watch."""
        self._stopped.set()

    def _look_on(self) -> None:
        seen = 0
        while not self._stopped.wait(LOOK_AFTER_S):
            still = self._waiting and self._waits == seen
            seen = self._waits
            if still and not lives(self._channel) and self._waiting and self._waits == seen:
                self.lost = True
                self._cancel()
                return
