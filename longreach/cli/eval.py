"""`longreach eval`: how well methods answer over long contexts, beside full attention.

The evaluation itself is the package `evaluation`; it is imported when the command runs, because it
brings torch, and because the SDK's users need not have it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from longreach.cli.connection import Subparsers, add_command
from longreach.errors import InvalidRequest

_EPILOG = """\
A run asks every method the same questions over the same haystacks, which are made here, with the
model's own tokenizer, to exact lengths. Always include `full`: it is what the others are compared
with, question by question.

examples:
  longreach eval --list                      every task and method, one line each
  longreach eval --quick --json out/q.json   ends within five minutes
  longreach eval                             the default report: demo model, 4K to 128K; needles
                                             and slow reference methods less far, unless named
  longreach eval --tasks needle --lengths 4K 8K 16K 32K --n 1 --json out/needle.json
  longreach eval --model Qwen/Qwen3-0.6B --tasks ruler infinitebench --lengths 32K --n 50 \\
      --methods full cluster:exact cluster/hnsw:top_k=100 'cluster:mass=0.98[64,4096]'
  longreach eval --address 10.0.0.7:7300 --model my-model --methods full cluster:top_k=100
  longreach eval --tasks qa_1 longbook_qa_eng --squad dev-v2.0.json --infinitebench data/
  longreach eval --page docs/results.md --json out/a.json out/b.json     a page of reports

files, for --json out/run.json:
  out/run.json     figures, targets, and all that repeats the run: command, configuration, machine
  out/run.md       tables in the papers' layout
  out/run.jsonl    every answer, written at once: the same command goes on where it was stopped,
                   and more tasks, lengths, methods or a larger --n add to it
  out/run.*.png    curves over length, budgets against accuracy, needle heatmaps (with .csv)

reading the figures:
  `difference` is a method's score minus full attention's on the same questions, with a 95%
  interval; `better` and `worse` count the questions that only one of the two answered. A small n
  cannot show a small loss: 0 worse of 36 still allows a loss of 10 points. `attended` is the share
  of the keys on the nodes that entered a softmax; `scan`, `sketch` and `bytes` say what finding
  them cost.
"""


def add_parser(commands: Subparsers) -> None:
    """Adds the subcommand."""
    parser = add_command(
        commands, "eval", "measure answers over long contexts against full attention", _EPILOG
    )
    add_flags(parser)
    parser.set_defaults(run=run)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags, for `python -m evaluation` too."""
    asked = parser.add_argument_group("what is asked")
    add = asked.add_argument
    add("--model", default="models/demo", help="directory or hub name (default %(default)s)")
    add("--tasks", nargs="+", metavar="NAME", help="tasks or suites, see --list")
    add("--lengths", nargs="+", type=length, metavar="TOKENS", help="such as 4K or 32768")
    add("--methods", nargs="+", metavar="METHOD", help="see --list")
    add("--n", type=count, help="rounds: haystacks per task and length")
    add("--seed", type=int, default=0, help="another seed gives other samples (default 0)")
    add("--quick", action="store_true", help="small defaults; stops asking after 4 minutes")
    add(
        "--jobs", type=count, metavar="N",
        help="processes that answer side by side, each with the model and a context in memory "
        "(default: one for each CPU, at most 4; one with --quick)",
    )  # fmt: skip
    files = parser.add_argument_group("files")
    add = files.add_argument
    add(
        "--json", nargs="+", type=Path, metavar="PATH", default=[Path("eval/report.json")],
        help="the report (default eval/report.json); the other files stand beside it",
    )  # fmt: skip
    add("--page", type=Path, metavar="FILE.md", help="write a page of the --json reports; no run")
    add("--essay", type=Path, metavar="FILE", help="long text to hide needles in")
    add("--squad", type=Path, metavar="FILE", help="SQuAD v2 JSON, for qa_1")
    add("--hotpotqa", type=Path, metavar="FILE", help="HotpotQA JSON, for qa_2")
    add("--infinitebench", type=Path, metavar="DIR", help="InfiniteBench's JSONL files")
    cluster = parser.add_argument_group("the cluster of methods that need one")
    add = cluster.add_argument
    add("--address", metavar="HOST:PORT", help="a running one that serves the model")
    add("--nodes", type=count, default=2, help="of one started here (default 2)")
    add("--sink-tokens", type=int, default=128, help="first tokens on the worker (default 128)")
    add("--window-tokens", type=int, default=512, help="last tokens on the worker (default 512)")
    parser.add_argument("--list", action="store_true", help="print tasks and methods; no run")


def run(arguments: argparse.Namespace) -> int:
    """Runs the evaluation; returns the exit status."""
    try:
        from evaluation import command
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"longreach eval needs the module {error.name!r}: run it in a checkout of longreach, "
            "or install longreach[worker,evaluation]"
        ) from error
    return command.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """`longreach eval` without the other subcommands."""
    from longreach.cli.__main__ import main as longreach

    return longreach(["eval", *(sys.argv[1:] if argv is None else argv)])


def length(text: str) -> int:
    """Tokens of "4096" or "4K"."""
    match = re.fullmatch(r"(\d+)([Kk]?)", text)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a length; write 4096 or 4K")
    return int(match[1]) * (1024 if match[2] else 1)


def count(text: str) -> int:
    """A number from 1 on."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)
