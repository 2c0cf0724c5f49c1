"""What a worker reports to coordinators."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

from gpu_worker.config import WorkerConfig
from longreach.rpc.membership import MemberReport
from longreach.steps import WorkerStatus

_INCARNATION_BITS = 64


def worker_reports(
    config: WorkerConfig, address: str, status: Callable[[], WorkerStatus]
) -> Callable[[], MemberReport]:
    """Makes reports of this process's life, which has an incarnation number of its own."""
    incarnation = secrets.randbits(_INCARNATION_BITS)
    advertised = config.advertise or address
    member_id = config.member_id(address)

    def report() -> MemberReport:
        return MemberReport(
            member_id=member_id,
            incarnation=incarnation,
            address=advertised,
            host=config.host_name,
            zone=config.zone,
            cores=os.cpu_count() or 1,
            worker=status(),
        )

    return report
