"""`python -m coordinator`: serves until SIGTERM, then drains."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sys

from coordinator import cluster_metrics
from coordinator.config import CoordinatorConfig
from coordinator.server import CoordinatorServer
from longreach.config import read_config
from longreach.errors import LongreachError
from longreach.logging import configure
from longreach.process import wait_for_stop_async
from longreach.security.peers import Role
from longreach.security.tls import member_files
from longreach.telemetry.service import Telemetry

_log = logging.getLogger("coordinator")


async def serve(config: CoordinatorConfig) -> None:
    """Serves until a signal asks to stop."""
    files = member_files(config, Role.COORDINATOR, config.coordinator_id)
    if files is not None and files.identity is not None:
        config = dataclasses.replace(config, coordinator_id=files.identity.member_id)
    telemetry = Telemetry(config)
    telemetry.begin(
        "coordinator", config.name, files=files, trace_sample_share=config.trace_sample_share
    )
    server = CoordinatorServer(config, files)
    cluster_metrics.observe(server.coordinator, asyncio.get_running_loop())
    address = await server.start()
    await wait_for_stop_async(config.exit_with_parent, address=address)
    _log.info("stopping: running generations have %.0f s", config.drain_grace_s)
    await server.stop()
    await asyncio.to_thread(telemetry.stop)


def main() -> int:
    """Runs the coordinator; returns 0 after a signal, 2 when it cannot start."""
    try:
        configure(service="coordinator")
        config = read_config(CoordinatorConfig, "coordinator")
        configure(format=config.log_format)
        asyncio.run(serve(config))
    except LongreachError as error:
        _log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
