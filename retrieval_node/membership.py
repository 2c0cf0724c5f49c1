"""What a node reports to coordinators."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable

from longreach.rpc.membership import MemberReport
from longreach.types import NodeStats
from retrieval_node.config import NodeConfig

_INCARNATION_BITS = 64
_WILDCARDS = ("", "0.0.0.0", "[::]")


def node_reports(
    config: NodeConfig, address: str, stats: Callable[[], NodeStats]
) -> Callable[[], MemberReport]:
    """Makes reports of this process's life, which has an incarnation number of its own."""
    incarnation = secrets.randbits(_INCARNATION_BITS)
    advertised = config.advertise or _reachable(address)
    member_id = config.member_id(address)

    def report() -> MemberReport:
        return MemberReport(
            member_id=member_id,
            incarnation=incarnation,
            address=advertised,
            host=config.host_name,
            zone=config.zone,
            cores=os.cpu_count() or 1,
            node=stats(),
        )

    return report


def _reachable(address: str) -> str:
    """The address as others know it: a wildcard host is only meaningful on this machine."""
    host, _, port = address.rpartition(":")
    return f"{socket.gethostname()}:{port}" if host in _WILDCARDS else address
