"""A GenerationService that plays a script, for tests of what talks to a coordinator."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from longreach.errors import LongreachError
from longreach.rpc.channels import server_options
from longreach.rpc.status import map_errors
from longreach.v1 import generation_pb2 as pb
from longreach.v1 import generation_pb2_grpc


class ScriptedService(generation_pb2_grpc.GenerationServiceServicer):
    """Replies what the test put into it and records what it was asked."""

    def __init__(self) -> None:
        self.received: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.error: LongreachError | None = None
        self.create_replies: list[pb.CreateContextResponse] = []
        self.contexts: list[pb.Context] = []
        self.generate_replies: list[pb.GenerateResponse] = []
        self.status = pb.GetStatusResponse()
        self.hold = threading.Event()
        self.hold.set()
        self.ended = threading.Event()
        self.cancelled = False

    def _begin(self, context: grpc.ServicerContext) -> None:
        self.metadata = dict(context.invocation_metadata())

        def end() -> None:
            self.cancelled = self.cancelled or context.code() is None
            self.hold.set()
            self.ended.set()

        context.add_callback(end)
        if self.error is not None:
            raise self.error

    @map_errors
    def CreateContext(self, request_iterator: Any, context: Any) -> Iterator[Any]:
        self._begin(context)
        for request in request_iterator:
            self.received.append(request)
        for reply in self.create_replies:
            yield reply
            self.hold.wait(10)

    @map_errors
    def GetContext(self, request: Any, context: Any) -> Any:
        self._begin(context)
        self.received.append(request)
        return pb.GetContextResponse(context=self.contexts.pop(0))

    @map_errors
    def ListContexts(self, request: Any, context: Any) -> Any:
        self._begin(context)
        return pb.ListContextsResponse(contexts=self.contexts)

    @map_errors
    def DeleteContext(self, request: Any, context: Any) -> Any:
        self._begin(context)
        self.received.append(request)
        return pb.DeleteContextResponse(bytes_freed=77)

    @map_errors
    def Generate(self, request: Any, context: Any) -> Iterator[Any]:
        self._begin(context)
        self.received.append(request)
        for reply in self.generate_replies:
            yield reply
            self.hold.wait(10)
            if not context.is_active():
                self.cancelled = True
                return

    @map_errors
    def GetStatus(self, request: Any, context: Any) -> Any:
        self._begin(context)
        return self.status


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
def address(service: ScriptedService) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4), options=server_options())
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    service.hold.set()
    server.stop(None).wait()
