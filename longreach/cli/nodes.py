"""`longreach nodes`: retrieval nodes on their way out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from longreach.cli.connection import Subparsers, add_command, add_connection_flags
from longreach.rpc.administration import DrainReport, drain_node
from longreach.rpc.tls import ChannelTls
from longreach.security.tls import client_files

_EPILOG = """\
examples:
  longreach nodes drain node-3                 copy what it holds elsewhere, then stop it
  longreach nodes drain node-3 --timeout-s 600

A node that drains gets nothing new and answers until it is stopped; its shards are copied to other
nodes at the bandwidth that --copy-bytes-per-s allows there. Where the coordinator has a port of its
own for members (--cluster-listen), name that one.

exit status: 1 when something is left that no other node can take, or the time was over
"""


def add_parser(commands: Subparsers) -> None:
    """Adds the subcommand."""
    parser = add_command(commands, "nodes", "empty a retrieval node before it is stopped", _EPILOG)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    drain = actions.add_parser("drain", help="move what a node holds to others")
    add_connection_flags(drain)
    drain.add_argument("node", metavar="NODE", help="its id; see: longreach status")
    drain.add_argument("--json", action="store_true", help="print the outcome as JSON")
    drain.set_defaults(run=run_drain)


def run_drain(arguments: argparse.Namespace) -> int:
    """Drains, tells how far it is, and says what is left."""
    files = client_files(arguments.tls_cert, arguments.tls_key, arguments.tls_ca)
    told: DrainReport | None = None
    for report in drain_node(
        arguments.address,
        arguments.node,
        tls=ChannelTls(files) if files else None,
        timeout_s=arguments.timeout_s,
    ):
        if told is None or report.shards_left != told.shards_left:
            print(f"{arguments.node}: {_left(report)}", file=sys.stderr)
        told = report
    assert told is not None  # the first reply comes at once
    if arguments.json:
        print(json.dumps(dataclasses.asdict(told), indent=2))
    elif not told.shards_left:
        print(f"{arguments.node} is empty and may be stopped")
    if told.shards_left:
        why = (
            "no other node has the room, or there is none: add nodes, or delete contexts"
            if told.stuck
            else "the time is over; it goes on draining: ask again, or give it more --timeout-s"
        )
        print(f"longreach: {_left(told)} on {arguments.node}; {why}", file=sys.stderr)
    return int(bool(told.shards_left))


def _left(report: DrainReport) -> str:
    return (
        f"{report.shards_left} shards ({report.bytes_left / 2**20:,.1f} MiB) left, "
        f"{report.sessions} sessions open"
    )
