"""`longreach catalog`: the coordinators' record of what is stored where."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from longreach.cli.connection import Subparsers, add_command, add_connection_flags
from longreach.rpc.administration import rebuild_catalog
from longreach.rpc.tls import ChannelTls
from longreach.security.tls import client_files

_EPILOG = """\
examples:
  longreach catalog rebuild                restore what a lost Redis or SQLite file held

The catalog is soft state: coordinators restore it by themselves when they start on an empty one.
Run this after a partial loss. Names of contexts are not known to nodes and stay empty. Where the
coordinator has a port of its own for members (--cluster-listen), name that one.

exit status: 1 when known nodes did not answer, so that the rebuild may not be complete
"""


def add_parser(commands: Subparsers) -> None:
    """Adds the subcommand."""
    parser = add_command(commands, "catalog", "restore the record of stored contexts", _EPILOG)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    rebuild = actions.add_parser("rebuild", help="restore the catalog from what nodes hold")
    add_connection_flags(rebuild)
    rebuild.add_argument("--json", action="store_true", help="print JSON")
    rebuild.set_defaults(run=run_rebuild)


def run_rebuild(arguments: argparse.Namespace) -> int:
    """Rebuilds and prints what was found."""
    files = client_files(arguments.tls_cert, arguments.tls_key, arguments.tls_ca)
    report = rebuild_catalog(
        arguments.address,
        tls=ChannelTls(files) if files else None,
        timeout_s=arguments.timeout_s,
    )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        for context_id in report.found:
            print(f"found {context_id}")
        print(
            f"{len(report.found)} contexts found, {report.contexts} in the catalog; "
            f"asked {', '.join(report.answered) or 'no node'}"
        )
    if report.silent:
        print(f"longreach: no answer from {', '.join(report.silent)}", file=sys.stderr)
    return 1 if report.silent else 0
