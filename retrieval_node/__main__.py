"""Starts a retrieval node: `python -m retrieval_node --help`."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from longreach.config import read_config
from longreach.errors import LongreachError
from longreach.logging import configure
from longreach.process import wait_for_stop
from longreach.rpc.membership import HeartbeatSender
from retrieval_node import kernel
from retrieval_node.builds import Builder
from retrieval_node.config import NodeConfig
from retrieval_node.membership import node_reports
from retrieval_node.memory import MemoryBudget
from retrieval_node.server import start_server
from retrieval_node.snapshot import Snapshots
from retrieval_node.store import Store

_LOG = logging.getLogger("retrieval_node")
_EXPIRE_INTERVAL_S = 5.0
_GRACE_S = 5.0


def build_store(config: NodeConfig) -> Store:
    """The store that a configuration asks for, empty."""
    kernel.set_threads(config.search_threads)
    memory = MemoryBudget(config.memory_limit)
    return Store(
        secret=config.cluster_secret.encode(),
        memory=memory,
        builder=Builder(memory, config.index_kind, config.build_threads),
        snapshots=Snapshots(Path(config.snapshot_dir)) if config.snapshot_dir else None,
        isa=kernel.isa(),
    )


def run(config: NodeConfig) -> None:
    """Serves until told to stop."""
    store = build_store(config)
    server, address, readiness = start_server(store, config.listen, config.max_streams)
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
        config.coordinator_addresses, node_reports(config, address, store.stats)
    )
    stopping = threading.Event()
    _repeat(lambda: store.expire(config.fill_timeout_s, config.session_timeout_s), stopping)
    readiness.set(True)
    heartbeats.start()
    wait_for_stop(config.exit_with_parent, address=address)
    readiness.set(False)
    heartbeats.stop()
    stopping.set()
    server.stop(_GRACE_S).wait()
    store.close()


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
    configure()
    try:
        run(read_config(NodeConfig, "retrieval_node", argv))
    except LongreachError as error:
        _LOG.error("%s", error.message)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
