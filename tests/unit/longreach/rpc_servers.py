"""Small real gRPC servers on loopback, for the tests of the clients."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np

from longreach import wire
from longreach.rpc.channels import server_options
from longreach.types import AttendResult, AttendRows, Budget, PartialAttention, Span, WorkFigures


@contextlib.contextmanager
def serving(add, servicer, port=0):
    """Serves a servicer; yields (address, server)."""
    server = grpc.server(ThreadPoolExecutor(8), options=server_options())
    add(servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{bound}", server
    finally:
        server.stop(None).wait()


def rows_of(value: float, count=1, handle=1) -> AttendRows:
    """Rows whose queries all hold `value`: 2 KV heads, 4 query heads, 8 dimensions."""
    queries = np.full((count, 4, 8), value, np.float32)
    return AttendRows(handle, 0, 2, Span(0, 64), Budget(exact=True), queries)


def echo(rows: AttendRows) -> AttendResult:
    """A result that shows which queries it answers."""
    partial = PartialAttention(rows.queries * 2, rows.queries[..., 0])
    return AttendResult(partial, WorkFigures(rows.handle), "echo")


def echo_response(request):
    """The reply to an AttendRequest whose results echo its rows."""
    rows = wire.attend_rows_from_proto(request)
    shapes = [each.queries.shape for each in rows]
    return wire.attend_response(
        request.request_id, [echo(each) for each in rows], shapes, wire.NodeTiming()
    )


class Acks:
    """Collects what a callback was told and lets tests wait for it."""

    def __init__(self):
        self.told = []
        self._changed = threading.Condition()

    def __call__(self, *what):
        with self._changed:
            self.told.append(what)
            self._changed.notify_all()

    def wait(self, count, timeout_s=20):
        """What was told, once that is `count` things."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.told) >= count, timeout_s), self.told
            return list(self.told)
