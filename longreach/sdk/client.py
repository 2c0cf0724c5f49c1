"""The synchronous client."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Unpack

import grpc

from longreach.errors import Cancelled, LongreachError
from longreach.rpc.channels import sync_channel
from longreach.rpc.status import error_from_rpc
from longreach.rpc.tls import ChannelTls
from longreach.sdk import messages
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
from longreach.sdk.upload import Upload
from longreach.sdk.watch import Watch, lives
from longreach.security.tls import client_files
from longreach.v1 import generation_pb2 as pb
from longreach.v1.generation_pb2_grpc import GenerationServiceStub

Progress = Callable[[Context], None]


class Client:
    """Talks to the coordinator at `address` (host:port); safe to use from several threads.

    Several addresses, comma separated, are coordinators of one cluster: when one is lost, calls go
    on at another, and a generation continues there without a gap or a repeat, for at most `retry_s`
    seconds without an answer. With one address a running generation waits that long for its
    coordinator to come back.

    `timeout_s` is the deadline of each call, none by default; every method takes its own. A call
    past its deadline raises DeadlineExceeded and is cancelled on the server. `api_key` is sent as a
    bearer token. `tls_ca` (a PEM file) turns TLS on; `tls_cert` and `tls_key` show the client's own
    certificate where the coordinator asks for one. The files are read again when they change. Close
    the client, or use it as a context manager.
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
        self._metadata = messages.call_metadata(api_key)
        files = client_files(tls_cert, tls_key, tls_ca)
        tls = ChannelTls(files) if files else None
        self._coordinators = [
            _Coordinator(each, sync_channel(each, tls=tls)) for each in split_addresses(address)
        ]
        self._index = 0
        self.contexts = Contexts(self)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> TokenStream:
        """Starts a generation after `prompt` (text or token ids); its tokens come as they are made.

        The keywords are those of options.GenerateOptions. Raises InvalidRequest at once; errors of
        the server are raised while the stream is read.
        """
        request = messages.generate_request(prompt, GenerateOptions(**options))
        return TokenStream(self, Resumption(request, self._retries(), self._time(timeout_s)))

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerateKeywords],
    ) -> Generation:
        """Like `stream`, but returns when the generation is finished."""
        with self.stream(prompt, timeout_s=timeout_s, **options) as tokens:
            for _ in tokens:
                pass
            return tokens.summary

    def status(self, *, timeout_s: float | None = None) -> Status:
        """Members, memory and load of the cluster."""
        return messages.status_from_proto(
            self._unary("GetStatus", pb.GetStatusRequest(), timeout_s)
        )

    def close(self) -> None:
        """Ends every call and frees the connections."""
        for coordinator in self._coordinators:
            coordinator.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _time(self, timeout_s: float | None) -> float | None:
        return self._timeout_s if timeout_s is None else timeout_s

    def _retries(self) -> Retries:
        return Retries(len(self._coordinators), self._index, self._retry_s)

    def _coordinator(self, retries: Retries) -> _Coordinator:
        """The coordinator to ask now; the next call begins there."""
        self._index = retries.index
        return self._coordinators[retries.index]

    def _watch(self, coordinator: _Coordinator, cancel: Callable[[], object]) -> Watch | None:
        """Watches a call where another coordinator could take it."""
        if len(self._coordinators) == 1:
            return None
        return Watch(coordinator.channel, cancel)

    def _upload(
        self,
        requests: Iterator[pb.CreateContextRequest],
        retries: Retries,
        timeout_s: float | None,
    ) -> Upload:
        coordinator = self._coordinator(retries)
        return Upload(
            coordinator.stub.CreateContext,
            requests,
            peer=coordinator.address,
            timeout_s=self._time(timeout_s),
            metadata=messages.traced(self._metadata),
            watch=lambda cancel: self._watch(coordinator, cancel),
        )

    def _unary(self, method: str, request: Any, timeout_s: float | None) -> Any:
        retries = self._retries()
        while True:
            try:
                return self._ask(self._coordinator(retries), method, request, timeout_s)
            except LongreachError as error:
                pause_s = retries.failed(error)
                if pause_s is None:
                    raise
                time.sleep(pause_s)

    def _ask(
        self, coordinator: _Coordinator, method: str, request: Any, timeout_s: float | None
    ) -> Any:
        call = getattr(coordinator.stub, method).future(
            request, timeout=self._time(timeout_s), metadata=messages.traced(self._metadata)
        )
        try:
            while True:
                try:
                    return call.result(None if len(self._coordinators) == 1 else LOOK_AFTER_S)
                except grpc.FutureTimeoutError:
                    if not lives(coordinator.channel):
                        raise silent(coordinator.address) from None
        except grpc.RpcError as error:
            raise error_from_rpc(error, peer=coordinator.address) from error
        finally:
            call.cancel()


@dataclass(frozen=True, slots=True)
class _Coordinator:
    """A coordinator and the connection to it."""

    address: str
    channel: grpc.Channel

    @property
    def stub(self) -> Any:
        """Its public service."""
        return GenerationServiceStub(self.channel)


class Contexts:
    """The contexts of a cluster; `client.contexts`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create(
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
        """Stores a context and returns when it can be asked; its index may still be building.

        Give exactly one of `text` (a string, or pieces that belong together), `tokens` and `path`
        (a UTF-8 file, streamed). An identical context is found (`Context.found`), not computed
        again. `on_progress` is called with the context as it stands. An exception, whether from the
        source, the callback or Ctrl-C, cancels the call, and the server drops what it received.
        When the coordinator is lost, another one is sent the content again, unless it came from an
        iterator, which can be read only once.
        """
        content = messages.Content(
            text=text,
            tokens=tokens,
            path=path,
            name=name,
            model=model,
            placement=placement,
            replicas=replicas,
        )
        retries = self._client._retries()
        while True:
            try:
                with self._client._upload(content.requests(), retries, timeout_s) as upload:
                    for context in upload:
                        if on_progress is not None:
                            on_progress(context)
                    return upload.finished()
            except LongreachError as error:
                pause_s = retries.failed(error) if content.repeatable else None
                if pause_s is None:
                    raise
                time.sleep(pause_s)

    def get(self, context: Context | str, *, timeout_s: float | None = None) -> Context:
        """The context with this id. Raises NotFound."""
        request = pb.GetContextRequest(context_id=messages.context_id(context))
        reply = self._client._unary("GetContext", request, timeout_s)
        return messages.context_from_proto(reply.context)

    def list(self, *, timeout_s: float | None = None) -> tuple[Context, ...]:
        """All contexts of the caller, newest first."""
        reply = self._client._unary("ListContexts", pb.ListContextsRequest(), timeout_s)
        return tuple(messages.context_from_proto(each) for each in reply.contexts)

    def delete(self, context: Context | str, *, timeout_s: float | None = None) -> int:
        """Forgets a context and returns the bytes freed on the nodes. Raises NotFound."""
        request = pb.DeleteContextRequest(context_id=messages.context_id(context))
        return int(self._client._unary("DeleteContext", request, timeout_s).bytes_freed)

    def wait_indexed(
        self,
        context: Context | str,
        *,
        on_progress: Progress | None = None,
        timeout_s: float | None = None,
    ) -> Context:
        """Waits until the index of a context is complete; questions are answered before, too.

        Raises DeadlineExceeded after `timeout_s`, and FailedPrecondition if the context failed or
        its index did (reason INDEX_FAILED; the context still answers).
        """
        started = time.monotonic()
        polls = 0
        while True:
            current = self.get(context)
            if on_progress is not None:
                on_progress(current)
            wait_s = messages.index_wait_s(current, polls)
            if wait_s is None:
                return current
            if timeout_s is not None and time.monotonic() + wait_s - started > timeout_s:
                raise messages.index_timeout(current, timeout_s)
            time.sleep(wait_s)
            polls += 1


class TokenStream(Iterator[Token]):
    """Tokens of a running generation; iterate to read them.

    As a context manager it cancels the generation on leaving before its end. `summary` is the
    finished generation once the stream has been read to its end.
    """

    def __init__(self, client: Client, resumption: Resumption) -> None:
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
        self._watch = self._client._watch(self._at, self._call.cancel)

    @property
    def summary(self) -> Generation:
        """The finished generation. Raises FailedPrecondition before the end of the stream."""
        return self._builder.summary()

    def cancel(self) -> None:
        """Ends the generation on the server; reading on raises Cancelled. Harmless at the end."""
        self._cancelled = True
        self._end_attempt()

    def __next__(self) -> Token:
        while not self._pending:
            try:
                message = self._read()
            except LongreachError as error:
                pause_s = None if self._cancelled else self._resumption.failed(error)
                if pause_s is None:
                    raise
                time.sleep(pause_s)
                self._begin()
                continue
            if message is None:
                self._builder.finish()
                raise StopIteration
            self._pending = self._builder.feed(message)
            self._resumption.received(self._pending)
        return self._pending.pop(0)

    def _read(self) -> Any:
        """The next message, None at the end."""
        try:
            with self._watch or contextlib.nullcontext():
                message = next(self._call, None)
        except grpc.RpcError as error:
            lost = self._watch is not None and self._watch.lost
            self._end_attempt()
            if self._cancelled:
                raise Cancelled("this stream was cancelled by its reader") from None
            if lost:
                raise silent(self._at.address) from None
            raise error_from_rpc(error, peer=self._at.address) from error
        if message is None:
            self._end_attempt()
        return message

    def _end_attempt(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        self._call.cancel()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()
