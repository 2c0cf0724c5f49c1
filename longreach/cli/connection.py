"""Where the cluster is, and which context a person means."""

from __future__ import annotations

import argparse
import os
from typing import Any

from longreach.errors import NotFound
from longreach.sdk import Client, Context

DEFAULT_ADDRESS = "127.0.0.1:7300"

_TLS_FLAGS = {
    "tls_ca": "PEM file of the cluster's CA; turns TLS on",
    "tls_cert": "PEM file of a client certificate, where the cluster asks for one",
    "tls_key": "PEM file of its private key",
}

Subparsers = Any
"""What `add_subparsers` returns; argparse's own class for it is private."""


def add_command(commands: Subparsers, name: str, help: str, epilog: str) -> argparse.ArgumentParser:
    """A subcommand's parser, with its examples below the flags."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say where the coordinator is."""
    parser.add_argument(
        "--address",
        default=os.environ.get("LONGREACH_ADDRESS", DEFAULT_ADDRESS),
        metavar="HOST:PORT",
        help="the coordinator; several are comma separated "
        "[LONGREACH_ADDRESS, default %(default)s]",
    )
    for name, what in _TLS_FLAGS.items():
        variable = f"LONGREACH_{name.upper()}"
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=os.environ.get(variable, ""),
            metavar="FILE",
            help=f"{what} [{variable}]",
        )
    parser.add_argument(
        "--timeout-s", type=float, metavar="S", help="give up after this many seconds"
    )


def connect(arguments: argparse.Namespace) -> Client:
    """A client of the coordinator the flags name; LONGREACH_API_KEY is sent if it is set."""
    return Client(
        arguments.address,
        timeout_s=arguments.timeout_s,
        api_key=os.environ.get("LONGREACH_API_KEY"),
        tls_ca=arguments.tls_ca,
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
    )


def find_context(client: Client, wanted: str) -> Context:
    """The context with that id, that start of an id, or that name (the newest if several).

    Raises NotFound listing what there is.
    """
    known = client.contexts.list()
    for context in known:
        if wanted in (context.id, context.name):
            return context
    starting = [context for context in known if context.id.startswith(wanted)]
    if len(starting) == 1 and len(wanted) > len("ctx-"):
        return starting[0]
    names = ", ".join(context.name or context.id for context in known[:10])
    raise NotFound(
        f"no context {wanted!r}; "
        + (f"there is {names}" if names else "none is stored: longreach ingest FILE --name NAME")
    )
