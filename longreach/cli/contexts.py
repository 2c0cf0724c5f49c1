"""`longreach contexts`: what is stored."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

from rich.console import Console
from rich.table import Table

from longreach.cli.connection import (
    Subparsers,
    add_command,
    add_connection_flags,
    connect,
    find_context,
)
from longreach.errors import InvalidRequest
from longreach.sdk import Client, Context

_EPILOG = """\
examples:
  longreach contexts                        the same as: longreach contexts list
  longreach contexts show book
  longreach contexts delete book
  longreach contexts list --json | jq '.[].id'

A context is named by its id, the start of its id, or its name.
"""


def add_parser(commands: Subparsers) -> None:
    """Adds the subcommand."""
    parser = add_command(commands, "contexts", "list, show or delete stored contexts", _EPILOG)
    add_connection_flags(parser)
    parser.add_argument("action", nargs="?", choices=("list", "show", "delete"), default="list")
    parser.add_argument("context", nargs="?", metavar="ID|NAME", help="for show and delete")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the action."""
    if (arguments.action == "list") != (arguments.context is None):
        raise InvalidRequest(
            "contexts list takes no context"
            if arguments.action == "list"
            else f"contexts {arguments.action} needs an id or a name; see: longreach contexts list"
        )
    actions = {"list": _list, "show": _show, "delete": _delete}
    with connect(arguments) as client:
        actions[arguments.action](client, arguments)
    return 0


def _list(client: Client, arguments: argparse.Namespace) -> None:
    contexts = client.contexts.list()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(each) for each in contexts], indent=2))
        return
    table = Table("id", "name", "model", "state", "tokens", "KV MiB", "age", box=None)
    for each in contexts:
        size = f"{each.kv_bytes / 2**20:,.1f}"
        table.add_row(
            each.id, each.name, each.model, _state(each), f"{each.tokens:,}", size, _age(each)
        )
    Console().print(table if contexts else "no contexts; store one with: longreach ingest FILE")


def _show(client: Client, arguments: argparse.Namespace) -> None:
    context = client.contexts.get(find_context(client, arguments.context))
    if arguments.json:
        print(json.dumps(dataclasses.asdict(context), indent=2))
        return
    table = Table(show_header=False, box=None)
    table.add_row("id", context.id)
    table.add_row("name", context.name)
    table.add_row("model", context.model)
    table.add_row("state", _state(context) + (f": {context.error}" if context.error else ""))
    table.add_row("tokens", f"{context.tokens:,}")
    table.add_row("KV", f"{context.kv_bytes:,} bytes on the nodes, one copy")
    table.add_row("index", f"{_index(context)}, {context.index_bytes:,} bytes")
    table.add_row("prefill", f"{context.prefill_s:.1f} s, {_age(context)} ago")
    table.add_row("copies", _copies(context))
    table.add_row("placement", context.shard_map.reason or context.shard_map.policy)
    for shard in context.shard_map.shards:
        layers = ", ".join(map(str, shard.layers))
        table.add_row(
            f"  {shard.shard_id}",
            f"positions {shard.span}, layers {layers}, KV heads [{shard.kv_head_start}, "
            f"{shard.kv_head_stop}) on {', '.join(shard.node_ids)}",
        )
    Console(highlight=False).print(table)


def _delete(client: Client, arguments: argparse.Namespace) -> None:
    context = find_context(client, arguments.context)
    freed = client.contexts.delete(context)
    if arguments.json:
        print(json.dumps({"id": context.id, "bytes_freed": freed}))
    else:
        print(f"deleted {context.id}, {freed / 2**20:,.1f} MiB freed")


def _state(context: Context) -> str:
    if context.state == "filling":
        return f"filling {context.prefill_fraction:.0%}"
    return context.state


def _copies(context: Context) -> str:
    lacking, shards = context.shards_under_replicated, len(context.shard_map.shards)
    text = f"{context.replicas} of each shard wanted, placement epoch {context.shard_map.epoch}"
    return text + (f"; {lacking} of {shards} shards have fewer" if lacking else "")


def _index(context: Context) -> str:
    if context.indexed or not context.ready:
        return context.index_kind
    if context.index_error:
        return f"{context.index_kind}; the index failed: {context.index_error}"
    return f"{context.index_kind}, {context.index_fraction:.0%} built"


def _age(context: Context) -> str:
    seconds = max(0.0, time.time() - context.created_at)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
