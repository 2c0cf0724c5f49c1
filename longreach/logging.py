"""Logs of the services: one line each on stderr; stdout belongs to `process.announce`.

As text for people, or as one JSON object per line for collectors of logs, which then also says
what the work belonged to (`longreach/telemetry/scope.py`).
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys

from longreach.errors import InvalidRequest
from longreach.telemetry import scope

FORMATS = ("text", "json")

_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"
_identity: dict[str, str] = {}


def configure(level: str = "", *, format: str = "", service: str = "") -> None:
    """Sends every log record of at least `level` to stderr.

    The level is the variable LONGREACH_LOG_LEVEL when empty, INFO when that is unset too; the
    format, one of FORMATS, likewise LONGREACH_LOG_FORMAT, else text. Call it from the service's
    main, again once its configuration is read. Raises InvalidRequest for another format.
    """
    if service:
        _identity["service"] = service
    format = format or os.environ.get("LONGREACH_LOG_FORMAT", "text")
    if format not in FORMATS:
        raise InvalidRequest(f"log_format is {format!r}; it must be one of {', '.join(FORMATS)}")
    handler = logging.StreamHandler(sys.stderr)
    if format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter(_FORMAT, "%Y-%m-%dT%H:%M:%S"))
    logging.basicConfig(
        handlers=[handler],
        level=(level or os.environ.get("LONGREACH_LOG_LEVEL", "INFO")).upper(),
        force=True,
    )


def identify(engine: str) -> None:
    """Says under which id the service goes; JSON logs carry it from now on."""
    _identity["engine"] = engine


class JsonFormatter(logging.Formatter):
    """One JSON object: time (UTC), level, service, engine, logger, message, what the work belongs
    to as far as it is known, and the exception with its trace."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            **_identity,
            "logger": record.name,
            "message": record.getMessage(),
            **scope.fields(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
