"""A service of a benchmark's cluster whose telemetry is turned on and off while it runs.

`python -m benchmarks.switchable FLAGS` runs the service that BENCHMARK_SERVICE names; SIGUSR1 turns
its instruments and spans on, SIGUSR2 off. So both are measured in the same processes, which differ
from each other by more than telemetry costs.
"""

from __future__ import annotations

import os
import runpy
import signal
from typing import Any

from longreach.local_cluster import LocalCluster, MemberProcess

SERVICE = "BENCHMARK_SERVICE"


def make_switchable(cluster: LocalCluster) -> LocalCluster:
    """Has the members of a cluster, which has not started, run under this module."""
    for member in cluster.members:
        member.environment = {**member.environment, SERVICE: member.package}
        member.package = "benchmarks.switchable"
    return cluster


def switch(member: MemberProcess, on: bool) -> None:
    """Turns a member's telemetry on or off."""
    member.send_signal(signal.SIGUSR1 if on else signal.SIGUSR2)


def main() -> None:
    """Runs the service."""
    from longreach.telemetry import instruments, tracing

    tracers: list[Any] = []

    def turn(on: bool) -> None:
        instruments.pause(not on)
        if on and tracers:
            tracing.switch_on(tracers.pop())
        elif not on and tracing.tracer() is not None:
            tracers.append(tracing.tracer())
            tracing.switch_off()

    signal.signal(signal.SIGUSR1, lambda *_: turn(True))
    signal.signal(signal.SIGUSR2, lambda *_: turn(False))
    runpy.run_module(os.environ[SERVICE], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
