"""`longreach plan`: what a deployment takes, before anything is bought."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from longreach.cli.connection import Subparsers, add_command
from longreach.config import parse_bytes
from longreach.errors import InvalidRequest
from longreach.planning.accelerators import ACCELERATORS, find_accelerator
from longreach.planning.machine import DEFAULT_PROFILE, MachineProfile
from longreach.planning.plan import Workload, make_plan
from longreach.planning.quantities import bytes_text, parse_tokens, seconds_text
from longreach.planning.report import plan_json, plan_text
from longreach.planning.shapes import NAMED, load_shape
from longreach.planning.values import plan_values
from longreach.types import Budget

_NODE_MEMORY = "256GiB"

_EPILOG = f"""\
examples:
  longreach plan --model llama-3-8b --context 1M
  longreach plan --model models/demo --context 128K --nodes 3 --json | jq .nodes
  longreach plan --model llama-3-8b --context 1M --gpu a100-80g --ttft-target-s 20
  longreach plan --model llama-3-8b --context 1M --concurrency 4 --values > values-8b-1m.yaml
  longreach plan --measure                       measure this machine, once per kind of node

K and M are thousands and millions; Ki and Mi powers of two.
Models known by name: {", ".join(NAMED)}.
Estimates say which of their numbers were measured, published or assumed.
"""


def add_parser(commands: Subparsers) -> None:
    """Adds the subcommand."""
    parser = add_command(commands, "plan", "say what a deployment takes and costs", _EPILOG)
    parser.add_argument("--model", metavar="PATH|NAME", help="folder with config.json, or a name")
    parser.add_argument("--parameters", type=float, default=0, help="weights, if not to be counted")
    parser.add_argument("--dtype", default="auto", help="of weights and KV (default: the model's)")
    parser.add_argument(
        "--context", default="128K", metavar="TOKENS", help="longest context (default %(default)s)"
    )
    parser.add_argument(
        "--concurrency", type=int, default=1, metavar="N", help="sessions at a time (default 1)"
    )
    parser.add_argument(
        "--contexts", type=int, metavar="N", help="contexts stored (default: one per session)"
    )
    parser.add_argument(
        "--budget", default="top_k=100", metavar="RULE", help="keys a step may use (%(default)s)"
    )
    parser.add_argument(
        "--tail", default="2048", metavar="TOKENS", help="question and answer (default %(default)s)"
    )
    parser.add_argument("--gpu", default="a100-80g", help=f"of {', '.join(ACCELERATORS)}")
    _add_node_flags(parser)
    parser.add_argument(
        "--ttft-target-s", type=float, default=0, metavar="S", help="wanted time to first token"
    )
    parser.add_argument(
        "--sparse-density", type=float, default=0.1, metavar="SHARE",
        help="visible pairs that a sparse prefill computes (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--measure", action="store_true", help="measure this machine and keep its profile"
    )
    parser.add_argument(
        "--profile", type=Path, default=DEFAULT_PROFILE, metavar="PATH",
        help="machine profile, used where it exists (default %(default)s)",
    )  # fmt: skip
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    form.add_argument("--values", action="store_true", help="print values for the Helm chart")
    parser.set_defaults(run=run)


def _add_node_flags(parser: argparse.ArgumentParser) -> None:
    count = parser.add_mutually_exclusive_group()
    count.add_argument(
        "--nodes", type=int, default=0, metavar="N", help="retrieval nodes there are"
    )
    count.add_argument(
        "--node-memory", metavar="SIZE",
        help=f"memory of a node; the fewest that hold it are planned (default {_NODE_MEMORY})",
    )  # fmt: skip
    parser.add_argument(
        "--replicas", type=int, default=2, metavar="N", help="copies of everything (default 2)"
    )
    parser.add_argument(
        "--node-cores", type=int, default=16, metavar="N", help="cores of a node (default 16)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measures if asked to, then prints the plan of the model that was named."""
    if arguments.measure:
        _measure(arguments.profile, quiet=arguments.json or arguments.values)
    if not arguments.model:
        if arguments.measure:
            return 0
        raise InvalidRequest(f"no model; name one with --model: a folder, or {', '.join(NAMED)}")
    profile = MachineProfile.load(arguments.profile) if arguments.profile.exists() else None
    plan = make_plan(_workload(arguments), profile)
    if arguments.json:
        print(json.dumps(plan_json(plan), indent=2))
    else:
        print(plan_values(plan) if arguments.values else plan_text(plan))
    return 0


def _workload(arguments: argparse.Namespace) -> Workload:
    try:
        budget = Budget.parse(arguments.budget)
    except ValueError as problem:
        raise InvalidRequest(str(problem)) from None
    contexts = arguments.contexts
    node_memory = 0 if arguments.nodes else parse_bytes(arguments.node_memory or _NODE_MEMORY)
    return Workload(
        shape=load_shape(arguments.model, arguments.dtype, int(arguments.parameters)),
        context=parse_tokens(arguments.context),
        concurrency=arguments.concurrency,
        contexts=arguments.concurrency if contexts is None else contexts,
        accelerator=find_accelerator(arguments.gpu),
        budget=budget,
        tail_tokens=parse_tokens(arguments.tail),
        replicas=arguments.replicas,
        node_cores=arguments.node_cores,
        nodes=arguments.nodes,
        node_memory_bytes=node_memory,
        ttft_target_s=arguments.ttft_target_s,
        sparse_density=arguments.sparse_density,
    )


def _measure(path: Path, *, quiet: bool) -> None:
    from longreach.planning.measure import measure_machine

    profile = measure_machine()
    profile.save(path)
    if not quiet:
        print(
            f"measured on {profile.cpu}, {profile.cores} cores: memory "
            f"{bytes_text(profile.memory_bytes_s)}/s, round trip of a layer "
            f"{seconds_text(profile.round_trip_s)}; kept in {path}\n"
        )
