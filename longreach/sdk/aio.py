"""The asyncio client: the methods of `longreach.sdk.client` as coroutines."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Unpack

import grpc

from longreach.errors import Cancelled
from longreach.rpc.channels import aio_channel
from longreach.rpc.status import error_from_rpc
from longreach.rpc.tls import ChannelTls
from longreach.sdk import messages
from longreach.sdk.client import Client, Progress
from longreach.sdk.models import Context, Generation, Status, Token
from longreach.sdk.options import GenerateKeywords, GenerateOptions
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
        api_key: str | None = None,
        tls_ca: str = "",
        tls_cert: str = "",
        tls_key: str = "",
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._api_key = api_key
        self._metadata = messages.call_metadata(api_key)
        self._tls = {"tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
        files = client_files(tls_cert, tls_key, tls_ca)
        self._channel = aio_channel(address, tls=ChannelTls(files) if files else None)
        self._stub = GenerationServiceStub(self._channel)
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
        return AsyncTokenStream(self._call("Generate", request, timeout_s), self.address)

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
        """Ends every call and frees the connection."""
        await self._channel.close()
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
                self.address, timeout_s=self._timeout_s, api_key=self._api_key, **self._tls
            )
        return self._blocking

    def _call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        deadline_s = self._timeout_s if timeout_s is None else timeout_s
        return getattr(self._stub, method)(request, timeout=deadline_s, metadata=self._metadata)

    async def _unary(self, method: str, request: Any, timeout_s: float | None) -> Any:
        try:
            return await self._call(method, request, timeout_s)
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=self.address) from error


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
        requests = messages.create_requests(
            text=text,
            tokens=tokens,
            path=path,
            name=name,
            model=model,
            placement=placement,
            replicas=replicas,
        )
        with self._client._uploader()._upload(requests, timeout_s) as upload:
            while (context := await asyncio.to_thread(next, upload, None)) is not None:
                if on_progress is not None:
                    on_progress(context)
            return upload.finished()

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

    def __init__(self, call: Any, peer: str) -> None:
        self._call = call
        self._peer = peer
        self._replies = call.__aiter__()
        self._builder = messages.GenerationBuilder()
        self._pending: list[Token] = []
        self._cancelled = False

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
                self._pending = self._builder.feed(await anext(self._replies))
            except StopAsyncIteration:
                self._builder.finish()
                raise
            except asyncio.CancelledError:
                if self._cancelled:
                    raise Cancelled("this stream was cancelled by its reader") from None
                raise
            except grpc.RpcError as error:
                raise error_from_rpc(error, peer=self._peer) from error
        return self._pending.pop(0)

    async def __aenter__(self) -> AsyncTokenStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
