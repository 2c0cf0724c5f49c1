"""Copies of contexts under loss and departure of nodes: real processes with mutual TLS."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longreach.cli.__main__ import main
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


class Load:
    """Questions one after the other, until it is left; keeps what failed or was answered wrong."""

    def __init__(self, client: Client, expected: dict[str, list[int]]) -> None:
        self._client, self._expected = client, expected
        self._stop = threading.Event()
        self.asked = 0
        self.problems: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            for context, expected in self._expected.items():
                self.asked += 1
                try:
                    if ask(self._client, context) != expected:
                        self.problems.append(f"{context}: other tokens")
                except LongreachError as error:
                    self.problems.append(f"{context}: {error}")


def test_a_node_is_emptied_under_load_by_command_and_by_sigterm(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    with cluster.client(timeout_s=60) as client, cluster.client(timeout_s=60) as loader:
        made = [client.contexts.create(tokens=ids(400, seed)) for seed in range(3)]
        expected = {context.id: ask(client, context.id) for context in made}
        with Load(loader, expected) as load:
            assert main(["nodes", "drain", "node-0", "--timeout-s", "60"]) == 0
            assert "node-0 is empty" in capsys.readouterr().out
            for context in made:
                assert set().union(*holders(client, context.id)) == {"node-1", "node-2"}
            states = {each.id: each.state for each in client.status().members}
            assert states["node-0"] == "draining"
            # Shards are dropped there once no session is open; then it may go.
            eventually(lambda: used_bytes(client, "node-0") == 0)
            assert cluster.process("node-0").stop(grace_s=20) == 0

            # It comes back empty; another one is told to stop and hands over what it has first.
            cluster.restart("node-0")
            eventually(lambda: state_of(client, "node-0") == "alive")
            assert cluster.process("node-1").stop(grace_s=30) == 0
            for context in made:
                assert holders(client, context.id) == [{"node-0", "node-2"}] * len(
                    context.shard_map.shards
                )
        assert load.problems == []
        assert load.asked > 3

        # With two nodes left neither can be emptied, and the command says so.
        assert main(["nodes", "drain", "node-2", "--timeout-s", "60"]) == 1
        assert "no other node has the room" in capsys.readouterr().err


def used_bytes(client: Client, node: str) -> int:
    return next(each.used_bytes for each in client.status().members if each.id == node)


def state_of(client: Client, node: str) -> str:
    return next(each.state for each in client.status().members if each.id == node)


def answers(client: Client, context: str, expected: list[int]) -> bool:
    try:
        return ask(client, context) == expected
    except LongreachError:
        return False


@pytest.mark.parametrize(("placement", "part"), [("span", 1 / 3), ("layer", 1)])
def test_what_no_node_has_any_more_is_computed_again_from_the_tokens(
    cluster: LocalCluster, placement: str, part: float
) -> None:
    tokens = 1152
    with cluster.client(timeout_s=60) as client:
        plain = client.contexts.create(tokens=ids(tokens, 7), placement="layer", replicas=1)
        expected = ask(client, plain.id)
        client.contexts.delete(plain)
        made = client.contexts.create(tokens=ids(tokens, 7), placement=placement, replicas=1)
        assert made.shard_map.policy == placement
        assert ask(client, made.id) == expected
        holding = Counter(shard.node_ids[0] for shard in made.shard_map.shards)
        victim = min(holding, key=holding.__getitem__)
        assert holding[victim] == 1

        # Its memory and its disk are lost; the others keep what they have.
        cluster.process(victim).kill()
        shutil.rmtree(cluster.data_dir / "snapshots" / victim)
        cluster.restart(victim)
        eventually(lambda: client.status().reprefill_tokens > 0, timeout_s=60)
        eventually(lambda: client.contexts.get(made.id).state == "ready")
        assert client.status().reprefill_tokens == round(tokens * part)
        assert ask(client, made.id) == expected
        now = client.contexts.get(made.id)
        assert now.shard_map.epoch > made.shard_map.epoch
        assert now.shards_under_replicated == 0


def test_an_empty_node_is_filled_by_moves_under_load(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    kv_bytes = 400 * 3 * 2 * 2 * 16 * 4  # tokens, layers, heads, K and V, dims, fp32
    with (
        LocalCluster(
            tiny_model("llama"),
            nodes=3,
            data_dir=tmp_path,
            worker_flags=WORKER_FLAGS,
            node_flags={"memory_limit_bytes": 6 * kv_bytes},
            coordinator_flags={"rebalance_pause_s": 0.5, "replicas": 1},
            tls=True,
        ) as cluster,
        cluster.client(timeout_s=60) as client,
        cluster.client(timeout_s=60) as loader,
    ):
        made = [client.contexts.create(tokens=ids(400, seed)) for seed in range(6)]
        assert made[0].kv_bytes == kv_bytes
        expected = {context.id: ask(client, context.id) for context in made}
        with Load(loader, expected) as load:
            assert cluster.process("node-0").stop(grace_s=30) == 0
            assert not any("node-0" in set().union(*holders(client, c.id)) for c in made)
            cluster.restart("node-0")
            # Shares of used memory end up within 15% of the limit of each other.
            eventually(lambda: spread(client) < 0.15 * 6 * kv_bytes, timeout_s=60)
        assert load.problems == []
        assert any("node-0" in set().union(*holders(client, c.id)) for c in made)


def spread(client: Client) -> int:
    """The bytes between the fullest and the emptiest node; all of them where one is away."""
    nodes = [each for each in client.status().members if each.kind == "node"]
    if len(nodes) < 3 or any(each.state != "alive" for each in nodes):
        return 1 << 60
    used = [each.used_bytes for each in nodes]
    return max(used) - min(used)
