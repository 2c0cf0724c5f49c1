"""Logs of the services: one line each on stderr; stdout belongs to `process.announce`."""

from __future__ import annotations

import logging
import os
import sys

_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"


def configure(level: str = "") -> None:
    """Sends every log record of at least `level` to stderr.

    The level is the variable LONGREACH_LOG_LEVEL when empty, INFO when that is unset too. Call it
    once, from the service's main.
    """
    logging.basicConfig(
        stream=sys.stderr,
        format=_FORMAT,
        datefmt="%Y-%m-%dT%H:%M:%S",
        level=(level or os.environ.get("LONGREACH_LOG_LEVEL", "INFO")).upper(),
        force=True,
    )
