"""The node as a process: starts, serves, survives a kill with its snapshots, stops when told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from node_harness import (
    SCALE,
    SECRET,
    Sequence,
    read_capability,
    rows_for,
    session_record,
    write_capability,
)

from longreach.rpc.retrieval import NodeClient
from longreach.types import AttendResult, Span

pytestmark = pytest.mark.cluster
Start = Callable[..., tuple[subprocess.Popen, str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a node with flags; returns its process and address."""
    started: list[subprocess.Popen] = []

    def run(*flags: str) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-m", "retrieval_node", "--index-kind", "flat", *flags]
        process = subprocess.Popen(
            [*command, "--cluster-secret", SECRET.decode(), "--exit-with-parent", "true"],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        word, address = process.stdout.readline().split()
        assert word == "serving"
        return process, address

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_snapshotted(client: NodeClient) -> None:
    for _ in range(1000):
        (shard,), _ = client.inventory()
        if shard.snapshotted:
            return
    raise AssertionError("the shard was not written to disk")


def test_a_killed_node_comes_back_with_its_contexts(start, tmp_path: Path):
    sequence = Sequence(50, dtype="bfloat16")
    node, address = start("--snapshot-dir", str(tmp_path))
    client = NodeClient(address)
    shard = sequence.shard()
    client.put(
        "ctx-test",
        shard,
        sequence.identity,
        sequence.geometry,
        write_capability(),
        [sequence.block(0, 50)],
    )
    client.seal("ctx-test", shard.shard_id, write_capability(), sequence.token_ids)
    wait_snapshotted(client)
    before, _ = client.inventory()
    client.close()
    node.send_signal(signal.SIGKILL)
    node.wait()
    _, address = start("--snapshot-dir", str(tmp_path))
    client = NodeClient(address)
    assert client.inventory() == (before, [])
    record = session_record(50)
    handle, _ = client.open_session(
        read_capability(record), record, sequence.identity, [shard], sequence.geometry
    )
    rows = rows_for(handle, Span(0, 50))
    (result,) = client.attend_once(0, [rows], SCALE)
    assert isinstance(result, AttendResult)
    expected = sequence.reference(0, rows.queries, Span(0, 50))
    np.testing.assert_allclose(result.partial.output, expected.output, atol=1e-4)
    client.close()


def test_a_node_that_is_told_to_stop_ends_with_status_zero(start):
    node, _ = start()
    node.send_signal(signal.SIGTERM)
    assert node.wait(30) == 0
    assert node.stdout.read() == ""


def test_a_node_without_a_secret_does_not_start():
    ended = subprocess.run(
        [sys.executable, "-m", "retrieval_node", "--cluster-secret", ""],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "LONGREACH_CLUSTER_SECRET" in ended.stderr
    assert ended.stdout == ""


def test_a_node_s_blas_keeps_to_the_thread_that_calls_it():
    code = (
        "import os, retrieval_node.__main__\n"
        "import numpy as np\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "matrix = np.ones((400, 400), np.float32)\n"
        "np.linalg.eigh(matrix @ matrix)\n"
        "print(len(os.listdir('/proc/self/task')) - before, os.environ['OPENBLAS_NUM_THREADS'])"
    )
    clean = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean
    )
    started, setting = ended.stdout.split()[:2]
    assert (started, setting) == ("0", "1")
