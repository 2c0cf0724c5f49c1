"""`longreach up`: a cluster on this machine."""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from longreach.cli.connection import DEFAULT_ADDRESS, Subparsers, add_command
from longreach.errors import Unavailable
from longreach.local_cluster import DEFAULT_DATA_DIR, LocalCluster, raise_on_sigterm

_WATCH_S = 1.0

_EPILOG = """\
examples:
  longreach up --model models/demo
  longreach up --model Qwen/Qwen3-0.6B --nodes 4 --data-dir /var/lib/longreach
  longreach up --model models/demo --listen 0.0.0.0:7300     reachable from other machines
  longreach up --model models/demo --tls                     mutual TLS on every connection

Contexts are kept under the data directory: the next `up` over it finds them. Ctrl-C stops every
process; logs are in DATA_DIR/logs.
"""


def add_parser(commands: Subparsers) -> None:
    """Adds the subcommand."""
    parser = add_command(commands, "up", "start a cluster on this machine and stay", _EPILOG)
    parser.add_argument("--model", required=True, metavar="PATH|NAME", help="directory or hub name")
    parser.add_argument("--nodes", type=int, default=2, help="retrieval nodes (default 2)")
    parser.add_argument("--workers", type=int, default=1, help="workers (default 1)")
    parser.add_argument(
        "--data-dir", default=str(DEFAULT_DATA_DIR), help="kept between runs (default %(default)s)"
    )
    parser.add_argument(
        "--listen", default=DEFAULT_ADDRESS, metavar="HOST:PORT",
        help="the coordinator's address; port 0 picks a free one (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--prefill", default="adaptive", metavar="PATTERN",
        help="attention of prefills: adaptive (sparse, dense on short prompts), dense (exact), "
        "vertical_slash, ... (default %(default)s); part of what a stored context is found by",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default="auto", help="of the model and its KV (default: the model's own)"
    )
    parser.add_argument(
        "--tls", action="store_true",
        help="mutual TLS on every connection, with certificates made under the data directory",
    )  # fmt: skip
    parser.add_argument(
        "--start-timeout-s", type=float, default=600.0, metavar="S",
        help="how long loading the model may take (default %(default)s)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Starts the cluster, prints its addresses and stays until it is interrupted."""
    raise_on_sigterm()
    console = Console(stderr=True, highlight=False)
    cluster = LocalCluster(
        arguments.model,
        nodes=arguments.nodes,
        workers=arguments.workers,
        data_dir=arguments.data_dir,
        listen=arguments.listen,
        worker_flags={"prefill_pattern": arguments.prefill, "dtype": arguments.dtype},
        tls=arguments.tls,
        start_timeout_s=arguments.start_timeout_s,
    )
    console.print(f"starting {len(cluster.members)} processes, logs in {cluster.data_dir / 'logs'}")
    with cluster:
        for member in cluster.members:
            console.print(f"  {member.name:<12} {member.address:<22} pid {member.pid}")
        settings = " ".join(f"{name}={value}" for name, value in cluster.environment.items())
        console.print(f"ready: export {settings}; Ctrl-C stops", soft_wrap=True)
        try:
            _watch(cluster, console)
        except KeyboardInterrupt:
            console.print("stopping")
    return 0


def _watch(cluster: LocalCluster, console: Console) -> None:
    """Reports members that die; the cluster goes on without them, but not without coordinator."""
    reported: set[int] = set()
    while True:
        for member in cluster.members:
            if member.alive or member.pid in reported:
                continue
            reported.add(member.pid)
            try:
                member.require_alive()
            except Unavailable as error:
                console.print(error.message)
                if member.name == "coordinator":
                    raise
        sys.stderr.flush()
        time.sleep(_WATCH_S)
