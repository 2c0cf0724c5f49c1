"""A cluster of real processes around a tiny model, shared by the tests that leave it whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longreach.local_cluster import LocalCluster
from longreach.sdk import Client

# Small enough that most of a short context is retrieved from the nodes, and that tokens leave the
# window while decoding.
WORKER_FLAGS = {
    "sink_tokens": 4,
    "window_tokens": 64,
    "prefill_chunk_tokens": 128,
    "prefill_pattern": "dense",
}


@pytest.fixture(scope="session")
def shared_cluster(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCluster]:
    """Two nodes and a worker with the tiny llama; a test that harms it starts its own."""
    directory = tmp_path_factory.mktemp("shared-cluster")
    with LocalCluster(
        tiny_model("llama"), nodes=2, data_dir=directory, worker_flags=WORKER_FLAGS, tls=True
    ) as cluster:
        yield cluster


@pytest.fixture
def shared_client(shared_cluster: LocalCluster) -> Iterator[Client]:
    """A client of the shared cluster."""
    with shared_cluster.client(timeout_s=120) as client:
        yield client
