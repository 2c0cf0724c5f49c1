"""Entry point of the `longreach` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import longreach
from longreach.cli import (
    ask,
    catalog,
    certs,
    contexts,
    eval,
    ingest,
    nodes,
    plan,
    search_patterns,
    status,
    up,
)
from longreach.errors import InvalidRequest, LongreachError, Unavailable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_INTERRUPTED = 130

_EPILOG = """\
examples:
  longreach up --model models/demo           start a cluster on this machine and stay
  longreach ingest book.txt --name book      store a document (another terminal)
  longreach ask --context book "Who is the narrator?"
  longreach contexts list                    what is stored
  longreach nodes drain node-3               empty a node before it is stopped
  longreach status                           members, memory and load
  longreach plan --model llama-3-8b --context 1M   what that would take
  longreach eval --quick --json out/q.json   measure answers against full attention
  longreach search-patterns --model models/demo   a sparse prefill pattern for every head
  longreach certs init --out certs           certificates for mutual TLS

The coordinator's address is taken from --address, then LONGREACH_ADDRESS, then 127.0.0.1:7300.

exit status: 0 done, 1 the cluster refused or failed, 2 wrong use, 3 no answer from the cluster,
130 interrupted
"""

_WAY_OUT = """\
  the coordinator was looked for at {address}; --address or LONGREACH_ADDRESS names another,
  and this starts one: longreach up --model models/demo"""


def build_parser() -> argparse.ArgumentParser:
    """The command line of `longreach`."""
    parser = argparse.ArgumentParser(
        prog="longreach",
        description="Asks questions of documents whose KV cache does not fit a GPU.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"longreach {longreach.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (
        up,
        ingest,
        ask,
        contexts,
        status,
        certs,
        catalog,
        nodes,
        eval,
        plan,
        search_patterns,
    ):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except LongreachError as error:
        print(f"longreach: {error.message}", file=sys.stderr)
        address = getattr(arguments, "address", None)
        if isinstance(error, Unavailable) and address is not None:
            print(_WAY_OUT.format(address=address), file=sys.stderr)
        return _exit_status(error)
    except OSError as error:
        print(f"longreach: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("longreach: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _exit_status(error: LongreachError) -> int:
    if isinstance(error, InvalidRequest):
        return EXIT_USAGE
    if isinstance(error, Unavailable):
        return EXIT_UNAVAILABLE
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
