"""What a node reports to coordinators."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

from longreach.rpc.membership import MemberReport
from longreach.types import NodeStats
from retrieval_node.config import NodeConfig

_INCARNATION_BITS = 64


def node_reports(
    config: NodeConfig, address: str, stats: Callable[[], NodeStats]
) -> Callable[[], MemberReport]:
    """Makes reports of this process's life, which has an incarnation number of its own."""
    incarnation = secrets.randbits(_INCARNATION_BITS)
    advertised = config.advertise or address
    member_id = config.node_id or f"{config.host_name}:{address.rpartition(':')[2]}"

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
