"""Copies of contexts under loss and departure of nodes: real processes with mutual TLS."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longreach.errors import LongreachError
from longreach.local_cluster import LocalCluster
from longreach.sdk import Client
from tests.e2e.conftest import WORKER_FLAGS

pytestmark = pytest.mark.cluster

QUESTION = [9, 8, 7, 6, 5]


@pytest.fixture
def cluster(tiny_model: Callable[[str], Path], tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(
        tiny_model("llama"),
        nodes=3,
        data_dir=tmp_path,
        worker_flags=WORKER_FLAGS,
        coordinator_flags={"repair_grace_s": 0, "rebalance_pause_s": -1},
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


def eventually(holds: Callable[[], bool], timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)


def holders(client: Client, context: str) -> list[set[str]]:
    return [set(shard.node_ids) for shard in client.contexts.get(context).shard_map.shards]


def test_a_dead_nodes_shards_are_copied_and_a_second_loss_is_survived(
    cluster: LocalCluster,
) -> None:
    with cluster.client(timeout_s=60) as client:
        made = [client.contexts.create(tokens=ids(400, seed)) for seed in range(3)]
        expected = {context.id: ask(client, context.id) for context in made}
        assert all(len(nodes) == 2 for context in made for nodes in holders(client, context.id))
        assert client.status().segments_under_replicated == 0

        cluster.process("node-0").kill()
        eventually(lambda: client.status().segments_under_replicated > 0)
        eventually(lambda: client.status().segments_under_replicated == 0)
        for context in made:
            assert holders(client, context.id) == [{"node-1", "node-2"}] * len(
                context.shard_map.shards
            )
            now = client.contexts.get(context.id)
            assert now.shard_map.epoch > context.shard_map.epoch
            assert now.shards_under_replicated == 0
            assert ask(client, context.id) == expected[context.id]

        # What the copies answer alone.
        cluster.process("node-1").kill()
        for context in made:
            eventually(lambda context=context: answers(client, context.id, expected[context.id]))


def answers(client: Client, context: str, expected: list[int]) -> bool:
    try:
        return ask(client, context) == expected
    except LongreachError:
        return False
