"""`longreach search-patterns`: the sparse prefill pattern of every head of a model.

The search itself is in the packages `gpu_worker` and `evaluation`; they are imported when the
command runs, because they bring torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from longreach.cli.connection import Subparsers, add_command
from longreach.errors import InvalidRequest

_EPILOG = """\
A long prefill is faster when each query head attends only what matters to it. Heads differ: some
look at the first tokens and a window (a_shape), some at single columns and diagonals
(vertical_slash), some at blocks that depend on the text (block_sparse). This finds out, once for
a model, which pattern suits which head (MInference 1.0, arXiv 2407.02490, section 3.2):

  1. a key-value retrieval prompt is prefilled with dense attention;
  2. in each layer, the sizes of every candidate are adjusted until it takes as long on this
     machine as a_shape with 1024 first tokens and a window of 4096, by measurement;
  3. each head gets the candidate whose output is nearest to dense attention's.

A search needs no cluster. One that is stopped goes on after its last finished layer when the same
command is given again. On prompts shorter than 30,000 tokens the published sizes shrink in
proportion, which the file records: search at the lengths you serve. Nothing else should run on the
machine meanwhile: costs are measured.

The file holds the choice and its error for each head, what every candidate cost and its error, the
calibration, this configuration and the machine. Workers use it as --prefill-pattern minference:

examples:
  longreach search-patterns --model models/demo
  longreach up --model models/demo --prefill minference
  longreach search-patterns --model Qwen/Qwen3-0.6B --tokens 30000 --output qwen3.json
  longreach up --model Qwen/Qwen3-0.6B --prefill minference:file=qwen3.json

Without a file, `minference` falls back to `adaptive`, which needs none.
"""


def add_parser(commands: Subparsers) -> None:
    """Adds the subcommand."""
    parser = add_command(
        commands,
        "search-patterns",
        "find each head's sparse prefill pattern, once for a model",
        _EPILOG,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="PATH|NAME", help="directory or hub name")
    add(
        "--output", type=Path, metavar="FILE",
        help="the file to write (default: patterns.json in the model's directory)",
    )  # fmt: skip
    add(
        "--tokens", type=int, metavar="N",
        help="length of the calibration prompt (default 30000 on a GPU, 8192 on a CPU)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="another seed gives another prompt (default 0)")
    add("--device", default="auto", help="torch device (default: cuda where there is one)")
    add("--dtype", default="auto", help="as served (default: the model's own)")
    measured = parser.add_argument_group("how costs are measured")
    add = measured.add_argument
    add("--chunks", type=int, default=4, help="chunks of the prompt attended (default 4)")
    add("--chunk-rows", type=int, default=2048, help="query rows of a chunk (default 2048)")
    add("--repeats", type=int, default=2, help="runs, of which the fastest counts (default 2)")
    add(
        "--tolerance", type=float, default=0.1, metavar="SHARE",
        help="how much dearer than the target a candidate may be (default 0.1)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Searches and prints the path of the file."""
    _check(arguments)
    try:
        from evaluation import pattern_search
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"longreach search-patterns needs the module {error.name!r}: run it in a checkout of "
            "longreach, or install longreach[worker,evaluation]"
        ) from error
    return pattern_search.run(arguments)


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("tokens", 512), ("chunks", 1), ("repeats", 1), ("chunk_rows", 128)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InvalidRequest(
                f"--{name.replace('_', '-')} is {value}; it must be at least {least}"
            )
    if arguments.chunk_rows % 128:
        raise InvalidRequest(
            f"--chunk-rows is {arguments.chunk_rows}; it must be a multiple of 128"
        )
    if not 0 < arguments.tolerance < 1:
        raise InvalidRequest(f"--tolerance is {arguments.tolerance}; it must lie between 0 and 1")
