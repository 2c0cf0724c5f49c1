"""Configuration of a retrieval node."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from longreach.config import setting
from longreach.errors import InvalidRequest
from longreach.security.tls import TlsSettings
from longreach.telemetry import TelemetrySettings

_SHARE_OF_MEMORY = 0.8
# Control groups of version 2, then of version 1.
_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


@dataclass(frozen=True)
class NodeConfig(TelemetrySettings, TlsSettings):
    """A retrieval node: stores KV, searches it and answers partial attention."""

    listen: str = setting("127.0.0.1:0", "host:port to answer on; port 0 picks a free one")
    advertise: str = setting(
        "",
        "host:port others reach this node at; empty for the listen address, with the machine's "
        "name where that is a wildcard",
    )
    node_id: str = setting("", "stable name of the node; empty for host name and port")
    host: str = setting("", "physical host, for replica placement; empty for the host name")
    zone: str = setting("", "zone, for replica placement; may be empty")
    memory_limit_bytes: int = setting(
        0, "bytes for KV, tails and indexes; 0 for 80% of the memory this process may use"
    )
    snapshot_dir: str = setting(
        "", "directory for snapshots of sealed shards, read at start; empty for none"
    )
    index_kind: str = setting("auto", "index kind to build over every sealed shard")
    build_threads: int = setting(1, "background threads that build indexes, at low priority")
    attend_threads: int = setting(0, "threads of one search; 0 for all cores")
    max_streams: int = setting(
        128, "concurrent RPCs; each pins a thread, one more is refused with RESOURCE_EXHAUSTED"
    )
    fill_timeout_s: float = setting(
        600.0, "a shard nobody has put into for this long without sealing it is dropped"
    )
    session_timeout_s: float = setting(
        3600.0, "a session nobody has read or appended to for this long is closed"
    )
    copy_bytes_per_s: int = setting(
        128 * 2**20,
        "bytes per second of copies from and to other nodes (repairs, drains, rebalancing); 0 for "
        "no limit",
    )
    drain_s: float = setting(
        20.0,
        "seconds that SIGTERM may take to move this node's shards to others first, where they lack "
        "copies; 0 leaves at once",
    )
    quality_sample_share: float = setting(
        0.001,
        "share of Attend messages of which one row and head is compared with exact attention, in "
        "the background and within 2% of one core, where metrics are exported; 0 for none",
    )
    coordinators: str = setting("", "host:port of the coordinators, comma separated")
    cluster_secret: str = setting("", "secret shared by the cluster's services; signs capabilities")
    exit_with_parent: bool = setting(False, "stop when the parent process is gone")

    def __post_init__(self) -> None:
        if not self.cluster_secret:
            raise InvalidRequest(
                "no cluster secret; set LONGREACH_CLUSTER_SECRET to the same random text on every "
                "service, so that the node can check what the coordinator signed"
            )
        if self.memory_limit_bytes < 0:
            raise InvalidRequest(
                f"memory_limit_bytes is {self.memory_limit_bytes}; write 0 or more"
            )
        if self.copy_bytes_per_s < 0:
            raise InvalidRequest(f"copy_bytes_per_s is {self.copy_bytes_per_s}; write 0 or more")
        if self.drain_s < 0:
            raise InvalidRequest(f"drain_s is {self.drain_s}; write 0 or more")
        if not 0 <= self.quality_sample_share <= 1:
            raise InvalidRequest(
                f"quality_sample_share is {self.quality_sample_share}; it must be in [0, 1]"
            )
        for name in ("build_threads", "max_streams"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def coordinator_addresses(self) -> tuple[str, ...]:
        """Addresses of the coordinators."""
        return tuple(part.strip() for part in self.coordinators.split(",") if part.strip())

    def member_id(self, address: str) -> str:
        """The node's name, with the default resolved; `address` is where it listens."""
        return self.node_id or f"{self.host_name}:{address.rpartition(':')[2]}"

    @property
    def samples_quality(self) -> bool:
        """Whether answers are sampled: somebody must see the result."""
        return self.quality_sample_share > 0 and bool(self.metrics_listen or self.otlp_endpoint)

    @property
    def host_name(self) -> str:
        """Physical host."""
        return self.host or socket.gethostname()

    @property
    def search_threads(self) -> int:
        """Threads of one search."""
        return self.attend_threads or os.cpu_count() or 1

    @property
    def memory_limit(self) -> int:
        """Bytes the node may use, with 0 resolved."""
        return self.memory_limit_bytes or int(_SHARE_OF_MEMORY * _memory_of_process())


def _memory_of_process() -> int:
    """Bytes of memory this process may use: its control group's limit, else the machine's."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CGROUP_LIMITS:
        try:
            with open(path, encoding="ascii") as limit:
                limits.append(int(limit.read()))
        except (OSError, ValueError):  # another version of control groups, or "max": no limit
            continue
    return min(limits)
