"""The procedures of docs/operations.md, their blocks run as they stand against real processes."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509

from longreach.local_cluster import LocalCluster, MemberProcess
from longreach.sdk import Client

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "operations.md"
BLOCKS = dict(re.findall(r"```sh\n# tested: ([^\n]+)\n(.*?)```", PAGE.read_text(), re.S))
TEXT = "The letter was written by the harbour master. " * 60
QUESTION = " Who wrote the letter?"
COORDINATOR_FLAGS: dict[str, object] = {"repair_grace_s": 0.5}

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def run_block(name: str, cluster: LocalCluster | None = None, **variables: object) -> str:
    """Runs a block of the page; returns what it printed."""
    environment = dict(os.environ) | (cluster.environment if cluster else {})
    environment |= {key: str(value) for key, value in variables.items()}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", BLOCKS[name]],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
        cwd=variables.get("FOLDER", ROOT),  # type: ignore[arg-type]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


def started(model: Path, folder: Path, nodes: int) -> LocalCluster:
    return LocalCluster(
        model,
        nodes=nodes,
        data_dir=folder,
        worker_flags={"sink_tokens": 4, "window_tokens": 64, "prefill_pattern": "dense"},
        coordinator_flags=COORDINATOR_FLAGS,
        tls=True,
    ).start()


@pytest.fixture(scope="module")
def cluster(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCluster]:
    """Three nodes, for the procedures that leave a cluster whole."""
    running = started(tiny_model("llama"), tmp_path_factory.mktemp("cluster"), 3)
    yield running
    running.stop()


def ask(client: Client, context: str) -> tuple[int, ...]:
    """The tokens of an exact answer, and that every part of the context was there."""
    answer = client.generate(QUESTION, context=context, max_tokens=6, budget="exact")
    assert answer.coverage == 1.0
    return tuple(token.id for token in answer.tokens)


def stored(client: Client) -> str:
    return client.contexts.create(text=TEXT, name="book").id


def answers_again(client: Client, context: str, wanted: tuple[int, ...]) -> None:
    def same() -> bool:
        try:
            return ask(client, context) == wanted
        except Exception:
            return False

    until(same)


def test_every_block_says_whether_it_is_tested() -> None:
    assert len(re.findall(r"```sh", PAGE.read_text())) == len(BLOCKS) >= 5


def test_sizes_are_computed(tmp_path: Path) -> None:
    printed = run_block("size", FOLDER=tmp_path)
    assert "nodes: 7 of" in printed
    assert "replicas: 7" in (tmp_path / "sizes.yaml").read_text()


def test_a_backup_brings_back_what_a_disk_lost(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    cluster = started(tiny_model("llama"), tmp_path / "cluster", 1)
    try:
        back_up_and_restore(cluster, tmp_path / "backup")
    finally:
        cluster.stop()


def back_up_and_restore(cluster: LocalCluster, backup: Path) -> None:
    snapshots = cluster.data_dir / "snapshots" / "node-0"
    backup.mkdir()
    with cluster.client(timeout_s=60) as client:
        context = stored(client)
        wanted = ask(client, context)
        until(lambda: any(snapshots.rglob("*")))
        run_block("back up", cluster, SNAPSHOTS=snapshots, BACKUP=backup, NODE="node-0")
    assert "book" in (backup / "contexts.json").read_text()
    for name in ("node-0", "coordinator"):
        cluster.process(name).kill()
    shutil.rmtree(snapshots)
    shutil.rmtree(cluster.data_dir / "coordinator")
    cluster.restart("coordinator")
    run_block("restore", cluster, SNAPSHOTS=snapshots, BACKUP=backup, NODE="node-0")
    cluster.restart("node-0")
    with cluster.client(timeout_s=60) as client:
        answers_again(client, context, wanted)


def test_nodes_restart_one_by_one(cluster: LocalCluster) -> None:
    with cluster.client(timeout_s=60) as client:
        context = stored(client)
        wanted = ask(client, context)
        for name in ("node-0", "node-1", "node-2"):
            cluster.restart(name)
            run_block("wait until whole", cluster)
            answers_again(client, context, wanted)


def test_a_drained_node_leaves_nothing_behind(cluster: LocalCluster) -> None:
    with cluster.client(timeout_s=60) as client:
        context = stored(client)
        wanted = ask(client, context)
        holders = {n for s in client.contexts.get(context).shard_map.shards for n in s.node_ids}
        leaving = min(holders)
        assert "empty and may be stopped" in run_block("drain", cluster, NODE=leaving)
        cluster.process(leaving).stop()
        assert client.status().segments_under_replicated == 0
        answers_again(client, context, wanted)
        now = {n for s in client.contexts.get(context).shard_map.shards for n in s.node_ids}
        assert leaving not in now
        assert len(now) == 2
    cluster.restart(leaving)


def test_a_certificate_is_replaced_under_the_running_node(
    cluster: LocalCluster,
) -> None:
    with cluster.client(timeout_s=60) as client:
        context = stored(client)
        wanted = ask(client, context)
        node = cluster.process("node-0")
        before = serial(cluster, node)
        run_block("rotate", cluster, NODE="node-0", CERTS=cluster.data_dir / "tls")
        until(lambda: serial(cluster, node) != before)
        assert ask(client, context) == wanted


def test_a_lost_machine_is_replaced(cluster: LocalCluster) -> None:
    with cluster.client(timeout_s=60) as client:
        context = stored(client)
        wanted = ask(client, context)
        holders = {n for s in client.contexts.get(context).shard_map.shards for n in s.node_ids}
        lost = min(holders)
        cluster.process(lost).kill()
        shutil.rmtree(cluster.data_dir / "snapshots" / lost)
        added = cluster._node("node-3")
        added.flags["--coordinators"] = cluster.address
        try:
            added.start()
            added.wait_announced(time.monotonic() + 60)
            until(lambda: client.status().segments_under_replicated > 0, 30)
            run_block("wait until whole", cluster)
            now = {n for s in client.contexts.get(context).shard_map.shards for n in s.node_ids}
            assert lost not in now
            assert client.contexts.get(context).shards_under_replicated == 0
            answers_again(client, context, wanted)
        finally:
            added.stop()


def serial(cluster: LocalCluster, member: MemberProcess) -> int:
    """The serial number of the certificate that a member shows."""
    files = cluster._client_files()
    assert files is not None
    context = ssl.create_default_context(cafile=str(files.ca))
    context.check_hostname = False
    context.load_cert_chain(str(files.certificate), str(files.key))
    context.set_alpn_protocols(["h2"])
    host, _, port = member.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname="node.longreach.internal") as shown,
    ):
        raw = shown.getpeercert(binary_form=True)
    assert raw is not None
    return x509.load_der_x509_certificate(raw).serial_number
