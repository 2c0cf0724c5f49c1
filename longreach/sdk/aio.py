"""The asyncio client: the methods of `longreach.sdk.client` as coroutines."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import grpc

from longreach.errors import Cancelled, LongreachError
from longreach.rpc.channels import aio_channel
from longreach.rpc.status import error_from_rpc
from longreach.rpc.tls import ChannelTls
from longreach.sdk import messages
from longreach.sdk.client import Client, Progress
from longreach.sdk.models import Context, Generation, Status, Token
from longreach.sdk.options import GenerateKeywords, GenerateOptions
from longreach.sdk.retries import (
    LOOK_AFTER_S,
    RETRY_S,
    Resumption,
    Retries,
    silent,
    split_addresses,
)
from longreach.sdk.watch import lives_async
from longreach.security.tls import client_files
from longreach.v1 import generation_pb2 as pb
from longreach.v1.generation_pb2_grpc import GenerationServiceStub


class AsyncClient:
    """Talks to a coordinator at `address` (host:port) from one event loop; see `Client`.

    Create it inside a running loop. Cancelling a task cancels its call on the server.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float | None = None,
        retry_s: float = RETRY_S,
        api_key: str | None = None,
        tls_ca: str = "",
        tls_cert: str = "",
        tls_key: str = "",
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._api_key = api_key
        self._metadata = messages.call_metadata(api_key)
        self._tls = {"tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
        files = client_files(tls_cert, tls_key, tls_ca)
        tls = ChannelTls(files) if files else None
        self._coordinators = [
            _Coordinator(each, aio_channel(each, tls=tls)) for each in split_addresses(address)
        ]
        self._index = 0
        self._blocking: Client | None = None
        self.contexts = AsyncContexts(self)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> AsyncTokenStream:
        """Starts a generation and returns its tokens as they come; see `Client.stream`."""
        request = messages.generate_request(prompt, GenerateOptions(**options))
        return AsyncTokenStream(self, Resumption(request, self._retries(), self._time(timeout_s)))

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> Generation:
        """Like `stream`, but returns when the generation is finished."""
        async with self.stream(prompt, timeout_s=timeout_s, **options) as tokens:
            async for _ in tokens:
                pass
            return tokens.summary

    async def status(self, *, timeout_s: float | None = None) -> Status:
        """Members, memory and load of the cluster."""
        reply = await self._unary("GetStatus", pb.GetStatusRequest(), timeout_s)
        return messages.status_from_proto(reply)

    async def close(self) -> None:
        """Ends every call and frees the connections."""
        for coordinator in self._coordinators:
            await coordinator.channel.close()
        if self._blocking is not None:
            self._blocking.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _uploader(self) -> Client:
        """A blocking client for uploads, which run in threads.

        grpc.aio loses the status of a call whose request stream the server refuses midway: the
        failed write overwrites it with INTERNAL. Threads also keep slow sources off the loop.
        """
        if self._blocking is None:
            self._blocking = Client(
                self.address,
                timeout_s=self._timeout_s,
                retry_s=self._retry_s,
                api_key=self._api_key,
                **self._tls,
            )
        return self._blocking

    def _time(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s

    def _retries(self) -> Retries:
        return Retries(len(self._coordinators), self._index, self._retry_s)

    def _coordinator(self, retries: Retries) -> _Coordinator:
        """The coordinator to ask now; the next call begins there."""
        self._index = retries.index
        return self._coordinators[retries.index]

    async def _unary(self, method: str, request: Any, timeout_s: float | None) -> Any:
        retries = self._retries()
        while True:
            coordinator = self._coordinator(retries)
            call = getattr(coordinator.stub, method)(
                request, timeout=self._time(timeout_s), metadata=messages.traced(self._metadata)
            )
            try:
                return await self._answer(coordinator, call)
            except LongreachError as error:
                pause_s = retries.failed(error)
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)
            finally:
                call.cancel()

    async def _answer(self, coordinator: _Coordinator, reply: Awaitable[Any]) -> Any:
        """A reply, or ConnectionLost when there is another coordinator and this one is silent."""
        waiting = asyncio.ensure_future(reply)
        watched = len(self._coordinators) > 1
        try:
            while not (await asyncio.wait([waiting], timeout=LOOK_AFTER_S if watched else None))[0]:
                if not await lives_async(coordinator.channel):
                    raise silent(coordinator.address)
            return waiting.result()
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=coordinator.address) from error
        finally:
            waiting.cancel()


@dataclass(frozen=True, slots=True)
class _Coordinator:
    """A coordinator and the connection to it."""

    address: str
    channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        """Its public service."""
        return GenerationServiceStub(self.channel)


class AsyncContexts:
    """The contexts of a cluster; `client.contexts`. See `longreach.sdk.client.Contexts`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create(
        self,
        *,
        text: str | Iterable[str] | None = None,
        tokens: Iterable[int] | None = None,
        path: str | os.PathLike[str] | None = None,
        name: str = "",
        model: str = "",
        placement: str = "",
        replicas: int = 0,
        on_progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> Context:
        """Stores a context and returns when it can be asked; see `Contexts.create`."""
        content = messages.Content(
            text=text,
            tokens=tokens,
            path=path,
            name=name,
            model=model,
            placement=placement,
            replicas=replicas,
        )
        client = self._client._uploader()
        retries = client._retries()
        while True:
            try:
                with client._upload(content.requests(), retries, timeout_s) as upload:
                    while (context := await asyncio.to_thread(next, upload, None)) is not None:
                        if on_progress is not None:
                            on_progress(context)
                    return upload.finished()
            except LongreachError as error:
                pause_s = retries.failed(error) if content.repeatable else None
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)

    async def get(self, context: Context | str, *, timeout_s: float | None = None) -> Context:
        """The context with this id. Raises NotFound."""
        request = pb.GetContextRequest(context_id=messages.context_id(context))
        reply = await self._client._unary("GetContext", request, timeout_s)
        return messages.context_from_proto(reply.context)

    async def list(self, *, timeout_s: float | None = None) -> tuple[Context, ...]:
        """All contexts of the caller, newest first."""
        reply = await self._client._unary("ListContexts", pb.ListContextsRequest(), timeout_s)
        return tuple(messages.context_from_proto(each) for each in reply.contexts)

    async def delete(self, context: Context | str, *, timeout_s: float | None = None) -> int:
        """Forgets a context and returns the bytes freed on the nodes. Raises NotFound."""
        request = pb.DeleteContextRequest(context_id=messages.context_id(context))
        reply = await self._client._unary("DeleteContext", request, timeout_s)
        return int(reply.bytes_freed)

    async def wait_indexed(
        self,
        context: Context | str,
        *,
        on_progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> Context:
        """Waits until the index of a context is complete; see `Contexts.wait_indexed`."""
        started = time.monotonic()
        polls = 0
        while True:
            current = await self.get(context)
            if on_progress is not None:
                on_progress(current)
            wait_s = messages.index_wait_s(current, polls)
            if wait_s is None:
                return current
            if timeout_s is not None and time.monotonic() + wait_s - started > timeout_s:
                raise messages.index_timeout(current, timeout_s)
            await asyncio.sleep(wait_s)
            polls += 1


class AsyncTokenStream(AsyncIterator[Token]):
    """Tokens of a running generation; see `TokenStream`."""

    def __init__(self, client: AsyncClient, resumption: Resumption) -> None:
        self._client = client
        self._resumption = resumption
        self._builder = messages.GenerationBuilder()
        self._pending: list[Token] = []
        self._cancelled = False
        self._begin()

    def _begin(self) -> None:
        """Asks the coordinator whose turn it is."""
        resumption = self._resumption
        self._at = self._client._coordinator(resumption.retries)
        self._call = self._at.stub.Generate(
            resumption.request,
            timeout=resumption.timeout_s,
            metadata=messages.traced(self._client._metadata),
        )

    @property
    def summary(self) -> Generation:
        """The finished generation. Raises FailedPrecondition before the end of the stream."""
        return self._builder.summary()

    def cancel(self) -> None:
        """Ends the generation on the server; reading on raises Cancelled. Harmless at the end."""
        self._cancelled = True
        self._call.cancel()

    async def __anext__(self) -> Token:
        while not self._pending:
            try:
                message = await self._client._answer(self._at, self._call.read())
            except asyncio.CancelledError:
                if self._cancelled:
                    raise Cancelled("this stream was cancelled by its reader") from None
                raise
            except LongreachError as error:
                self._call.cancel()
                pause_s = None if self._cancelled else self._resumption.failed(error)
                if pause_s is None:
                    raise
                await asyncio.sleep(pause_s)
                self._begin()
                continue
            if message is grpc.aio.EOF:
                self._builder.finish()
                raise StopAsyncIteration
            self._pending = self._builder.feed(message)
            self._resumption.received(self._pending)
        return self._pending.pop(0)

    async def __aenter__(self) -> AsyncTokenStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
