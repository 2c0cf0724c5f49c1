"""`longreach ask`: a question, answered token by token."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from longreach.cli.connection import (
    Subparsers,
    add_command,
    add_connection_flags,
    connect,
    find_context,
)
from longreach.sdk import Client, Generation, Work

_EPILOG = """\
examples:
  longreach ask --context book "Who is the narrator?"
  longreach ask --context book --budget exact --max-tokens 40 "Name the ship."
  longreach ask --context book --json "Name the ship." | jq .work
  longreach ask --temperature 0.8 --seed 7 "Tell me a story."

budgets (how many keys a decode step may use per query head):
  top_k=100          the 100 highest logits
  mass=0.98[64,4096] as many as hold 98% of the attention, at least 64, at most 4096
  beta=8             every key within 8 nats of the highest logit
  exact              every key
  Add +tail for an estimate of the keys left out, where the index can make one.
"""


def add_parser(commands: Subparsers) -> None:
    """Adds the subcommand."""
    parser = add_command(commands, "ask", "ask a question, of a stored context or of none", _EPILOG)
    add_connection_flags(parser)
    parser.add_argument("question", help="the question; - reads it from standard input")
    parser.add_argument(
        "--context", metavar="ID|NAME", help="stored context to ask; none if left out"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--max-tokens", type=int, default=0, metavar="N", help="at most N tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, default=0.0, metavar="P", help="nucleus share")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds draw equal tokens")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at TEXT")
    parser.add_argument("--budget", metavar="RULE", help="keys a step may use; see below")
    parser.add_argument(
        "--min-coverage", type=float, default=0.0, metavar="SHARE",
        help="answer even if only this share of the context can be reached (default: all of it)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Asks, prints the answer to standard output and what it took to standard error."""
    question = sys.stdin.read() if arguments.question == "-" else arguments.question
    with connect(arguments) as client:
        generation = _ask(client, question, arguments)
    if arguments.json:
        print(json.dumps(as_json(generation), indent=2, ensure_ascii=False))
    else:
        print(flush=True)
        print(figures(generation), file=sys.stderr)
    return 0


def _ask(client: Client, question: str, arguments: argparse.Namespace) -> Generation:
    context = find_context(client, arguments.context) if arguments.context else None
    stream = client.stream(
        question,
        context=context,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        stop=arguments.stop,
        budget=arguments.budget,
        min_coverage=arguments.min_coverage,
    )
    with stream:
        for token in stream:
            if not arguments.json:
                print(token.text, end="", flush=True)
        return stream.summary


def figures(generation: Generation) -> str:
    """What an answer took, in one or two lines."""
    usage, timing, work = generation.usage, generation.timing, generation.work
    lines = [
        f"{usage.completion_tokens} tokens ({generation.finish_reason}), the first after "
        f"{timing.first_token_s:.2f} s, then {timing.per_token_s * 1e3:.0f} ms each"
    ]
    if work.keys_in_scope:
        lines.append(
            f"of {usage.context_tokens:,} tokens: scanned {work.scan_fraction:.2%}, sketched "
            f"{work.sketch_fraction:.2%}, attended {work.attended_fraction:.2%}, read "
            f"{work.bytes_fraction:.2%} of the bytes; coverage {generation.coverage:.2f}"
        )
    return "\n".join(lines)


def as_json(generation: Generation) -> dict[str, Any]:
    """A generation as JSON, its work as counts and as the four fractions."""
    return {
        **dataclasses.asdict(generation),
        "work": work_as_json(generation.work),
        "prompt_work": work_as_json(generation.prompt_work),
    }


def work_as_json(work: Work) -> dict[str, Any]:
    """Counts of work and the four fractions they make."""
    return {
        **dataclasses.asdict(work),
        "scan_fraction": work.scan_fraction,
        "sketch_fraction": work.sketch_fraction,
        "attended_fraction": work.attended_fraction,
        "bytes_fraction": work.bytes_fraction,
    }
