"""`longreach status`: members, memory and load."""

from __future__ import annotations

import argparse
import dataclasses
import json

from rich.console import Console
from rich.table import Table

from longreach.cli.connection import (
    Subparsers,
    add_command,
    add_connection_flags,
    connect,
)
from longreach.sdk import Status

_EPILOG = """\
examples:
  longreach status
  longreach status --address 10.0.0.5:7300 --json | jq '.members[] | select(.state != "alive")'
"""


def add_parser(commands: Subparsers) -> None:
    """Adds the subcommand."""
    parser = add_command(commands, "status", "show the cluster's members, memory and load", _EPILOG)
    add_connection_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the cluster's state."""
    with connect(arguments) as client:
        status = client.status()
    if arguments.json:
        print(json.dumps(dataclasses.asdict(status), indent=2))
    else:
        Console(highlight=False).print(*_lines(status), sep="\n")
    return 0


def _lines(status: Status) -> list[str | Table]:
    table = Table("member", "kind", "address", "state", "sessions", "used MiB", "limit MiB",
                  "reported", "detail", box=None)  # fmt: skip
    for each in status.members:
        table.add_row(
            each.id, each.kind, each.address, each.state, str(each.sessions),
            f"{each.used_bytes / 2**20:,.0f}", f"{each.limit_bytes / 2**20:,.0f}",
            f"{each.age_s:.1f} s ago", each.detail,
        )  # fmt: skip
    return [
        f"coordinator {status.version}, membership epoch {status.epoch}",
        f"models: {', '.join(status.models) or 'none yet'}",
        f"contexts: {status.contexts}; shards with fewer copies than wanted: "
        f"{status.segments_under_replicated}",
        f"generations: {status.running} running, {status.waiting} waiting",
        table,
    ]
