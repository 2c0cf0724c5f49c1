"""The health client of containers, against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from longreach import health
from longreach.rpc.health import Readiness, serve_health

SERVICE = "longreach.v1.GenerationService"


@pytest.fixture
def served() -> Iterator[tuple[str, Readiness]]:
    server = grpc.server(ThreadPoolExecutor(2))
    readiness = serve_health(server, [SERVICE])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", readiness
    server.stop(0).wait()


def test_a_live_server_is_serving_and_a_service_only_once_it_is_ready(
    served: tuple[str, Readiness], capsys: pytest.CaptureFixture[str]
) -> None:
    address, readiness = served
    assert health.main([address]) == 0
    assert health.main([address, SERVICE]) == 1
    readiness.set(True)
    assert health.main([address, SERVICE]) == 0
    assert capsys.readouterr().out.split() == ["SERVING", "NOT_SERVING", "SERVING"]


def test_an_unknown_service_and_a_dead_server_fail_by_name(served: tuple[str, Readiness]) -> None:
    address, _ = served
    assert health.health_of(address, "longreach.v1.Other") == "NOT_FOUND"
    assert health.health_of("127.0.0.1:1", timeout_s=1) in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
