"""`python -m coordinator`: serves until SIGTERM, then drains."""

from __future__ import annotations

import asyncio
import logging

from coordinator.config import CoordinatorConfig
from coordinator.server import CoordinatorServer
from longreach.config import read_config
from longreach.logging import configure
from longreach.process import announce, wait_for_stop_async

_log = logging.getLogger(__name__)


async def serve(config: CoordinatorConfig) -> None:
    """Serves until a signal asks to stop."""
    server = CoordinatorServer(config)
    announce(await server.start())
    await wait_for_stop_async(config.exit_with_parent)
    _log.info("stopping: running generations have %.0f s", config.drain_grace_s)
    await server.stop()


def main() -> None:
    """Entry point."""
    configure()
    asyncio.run(serve(read_config(CoordinatorConfig, "coordinator")))


if __name__ == "__main__":
    main()
