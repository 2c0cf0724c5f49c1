"""`longreach ingest`: stores a document as a context."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator

from rich.console import Console

from longreach.cli.connection import (
    Subparsers,
    add_command,
    add_connection_flags,
    connect,
)
from longreach.cli.progress import context_bar
from longreach.errors import InvalidRequest
from longreach.sdk import Client, Context

_PIECE_CHARS = 1 << 18

_EPILOG = """\
examples:
  longreach ingest book.txt --name book
  pdftotext paper.pdf - | longreach ingest - --name paper
  CONTEXT=$(longreach ingest book.txt)       the id alone goes to standard output

The same document under the same model is found, not computed again. A context answers as soon as
it is stored, by exact search; its index is then built in the background.
"""


def add_parser(commands: Subparsers) -> None:
    """Adds the subcommand."""
    parser = add_command(commands, "ingest", "store a text document as a context", _EPILOG)
    add_connection_flags(parser)
    parser.add_argument("file", metavar="FILE", help="a UTF-8 text file; - reads standard input")
    parser.add_argument("--name", default="", help="a name to ask it by (default: the file's name)")
    parser.add_argument("--model", default="", help="needed when the cluster serves several models")
    parser.add_argument("--placement", default="", help="placement policy (default: planned)")
    parser.add_argument(
        "--replicas", type=int, default=0, help="copies on distinct nodes (default: the server's)"
    )
    parser.add_argument(
        "--no-wait", action="store_true", help="do not wait for the index; questions work already"
    )
    parser.add_argument("--json", action="store_true", help="print the context as a JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Stores the document; its id goes to standard output, the rest to standard error."""
    console = Console(stderr=True)
    started = time.monotonic()
    with connect(arguments) as client:
        context = _store(client, arguments, console)
        verb = "found" if context.found else "stored"
        console.print(
            f"{verb} {context.tokens:,} tokens, {context.kv_bytes / 2**20:,.0f} MiB of KV, in "
            f"{time.monotonic() - started:.1f} s",
            highlight=False,
        )
        if not arguments.no_wait:
            with context_bar(console, "index", "index") as show:
                context = client.contexts.wait_indexed(context, on_progress=show)
    print(json.dumps(dataclasses.asdict(context), indent=2) if arguments.json else context.id)
    return 0


def _store(client: Client, arguments: argparse.Namespace, console: Console) -> Context:
    from_stdin = arguments.file == "-"
    with context_bar(console, "prefill", "prefill") as show:
        return client.contexts.create(
            text=_stdin_pieces() if from_stdin else None,
            path=None if from_stdin else arguments.file,
            name=arguments.name or ("" if from_stdin else arguments.file),
            model=arguments.model,
            placement=arguments.placement,
            replicas=arguments.replicas,
            on_progress=show,
        )


def _stdin_pieces() -> Iterator[str]:
    try:
        while piece := sys.stdin.read(_PIECE_CHARS):
            yield piece
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"standard input is not {error.encoding} ({error.reason}); convert it, for example "
            "with iconv -t UTF-8",
            reason="NOT_UTF8",
        ) from None
