"""Starts a retrieval node: `python -m retrieval_node --help`."""

from __future__ import annotations

import os

# Read once, when NumPy and faiss load their BLAS. Index builds call it from --build-threads threads
# of low priority; more threads of its own would spin on the cores that searches need.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import dataclasses
import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from longreach.config import read_config
from longreach.errors import LongreachError
from longreach.logging import configure
from longreach.process import wait_for_stop
from longreach.rpc.membership import HeartbeatSender
from longreach.rpc.tls import ChannelTls
from longreach.security.peers import Role
from longreach.security.tls import member_files
from longreach.telemetry.service import Telemetry
from retrieval_node import kernel, metrics
from retrieval_node.builds import Builder
from retrieval_node.config import NodeConfig
from retrieval_node.membership import node_reports
from retrieval_node.memory import MemoryBudget
from retrieval_node.quality import sampler_with_metrics
from retrieval_node.server import start_server
from retrieval_node.snapshot import Snapshots
from retrieval_node.store import Store

_LOG = logging.getLogger("retrieval_node")
_EXPIRE_INTERVAL_S = 5.0
_GRACE_S = 5.0
_SESSIONS_S = 5.0


def build_store(config: NodeConfig) -> Store:
    """The store that a configuration asks for, empty."""
    kernel.set_threads(config.search_threads)
    memory = MemoryBudget(config.memory_limit)
    snapshots = None
    if config.snapshot_dir:
        snapshots = Snapshots(Path(config.snapshot_dir), config.index_kind)
    return Store(
        secret=config.cluster_secret.encode(),
        memory=memory,
        builder=Builder(memory, config.index_kind, config.build_threads),
        snapshots=snapshots,
        isa=kernel.isa(),
        quality=sampler_with_metrics(config.quality_sample_share)
        if config.samples_quality
        else None,
    )


def run(config: NodeConfig) -> None:
    """Serves until told to stop."""
    files = member_files(config, Role.NODE, config.node_id)
    if files is not None and files.identity is not None:
        config = dataclasses.replace(config, node_id=files.identity.member_id)
    telemetry = Telemetry(config)
    store = build_store(config)
    store.expect_snapshots()  # The server answers before they are read: its health is asked for.
    server, address, readiness = start_server(
        store,
        config.listen,
        config.max_streams,
        files,
        config.health_listen,
        config.copy_bytes_per_s,
    )
    telemetry.begin("node", config.member_id(address), files=files)
    metrics.observe(store)
    loaded = store.load_snapshots()
    _LOG.info(
        "node on %s: %d bytes, %s kernel, %s index, %d shards from snapshots",
        address,
        config.memory_limit,
        kernel.isa(),
        config.index_kind,
        loaded,
    )
    heartbeats = HeartbeatSender(
        config.coordinator_addresses,
        node_reports(config, address, store.stats),
        tls=ChannelTls(files, lambda _: Role.COORDINATOR.server_name) if files else None,
    )
    stopping = threading.Event()
    _repeat(lambda: store.expire(config.fill_timeout_s, config.session_timeout_s), stopping)
    readiness.set(True)
    heartbeats.start()
    wait_for_stop(config.exit_with_parent, address=address)
    _drain(heartbeats, config.drain_s, store)
    readiness.set(False)
    heartbeats.stop()
    stopping.set()
    server.stop(_GRACE_S).wait()
    store.close()
    telemetry.stop()


def _drain(heartbeats: HeartbeatSender, timeout_s: float, store: Store) -> None:
    """Has the node emptied before it goes, as far as others lack what it holds."""
    if not timeout_s:
        return
    began = time.monotonic()
    let_go_at = began + max(0.0, timeout_s - _SESSIONS_S)

    def idle() -> bool:
        """Sessions may end where they are for a while: to move costs them a moment."""
        nonlocal let_go_at
        let_go_at = min(let_go_at, time.monotonic() + _SESSIONS_S)
        return not store.stats().sessions or time.monotonic() >= let_go_at

    let_go = heartbeats.drain(timeout_s, idle)
    _LOG.info(
        "leaving after %.1f s; %s",
        time.monotonic() - began,
        "others have what they can" if let_go else "not everything may be elsewhere",
    )


def _repeat(work: Callable[[], None], stopping: threading.Event) -> None:
    def loop() -> None:
        while not stopping.wait(_EXPIRE_INTERVAL_S):
            try:
                work()
            except Exception:
                _LOG.exception("expiry failed")

    threading.Thread(target=loop, name="expiry", daemon=True).start()


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the configuration and runs; returns the exit status."""
    try:
        configure(service="node")
        config = read_config(NodeConfig, "retrieval_node", argv)
        configure(format=config.log_format)
        run(config)
    except LongreachError as error:
        _LOG.error("%s", error.message)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
