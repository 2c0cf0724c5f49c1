"""Both clients under one interface, against a server that plays a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from longreach.sdk import AsyncClient, Client
from tests.scripted_generation import address, service

__all__ = ["address", "service"]


class AwaitableClient:
    """A blocking Client behind the interface of AsyncClient, so that one test runs both."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.contexts = SimpleNamespace(
            **{
                name: _in_thread(getattr(client.contexts, name))
                for name in ("create", "get", "list", "delete", "wait_indexed")
            }
        )
        self.generate = _in_thread(client.generate)
        self.status = _in_thread(client.status)
        self.close = _in_thread(client.close)

    def stream(self, *args: Any, **options: Any) -> AwaitableStream:
        return AwaitableStream(self._client.stream(*args, **options))


class AwaitableStream:
    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.cancel = stream.cancel

    @property
    def summary(self) -> Any:
        return self._stream.summary

    def __aiter__(self) -> AwaitableStream:
        return self

    async def __anext__(self) -> Any:
        token = await asyncio.to_thread(next, self._stream, None)
        if token is None:
            raise StopAsyncIteration
        return token

    async def __aenter__(self) -> AwaitableStream:
        self._stream.__enter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        self._stream.__exit__(*details)


def _in_thread(method: Any) -> Any:
    async def call(*args: Any, **keywords: Any) -> Any:
        return await asyncio.to_thread(method, *args, **keywords)

    return call


@pytest.fixture(params=["sync", "async"])
async def client(request: pytest.FixtureRequest, address: str) -> AsyncIterator[Any]:
    made: Any = (
        AsyncClient(address, timeout_s=20, api_key="key-1")
        if request.param == "async"
        else AwaitableClient(Client(address, timeout_s=20, api_key="key-1"))
    )
    yield made
    await made.close()
