"""The RPC waterfall: what a decode step costs when the nodes compute nothing.

Real node processes decode and check every message of a Llama-3-8B-shaped step (32 layers, 8 KiB of
queries up, 16 KiB of partial attention down) and answer zeros. The client is the worker's: pure
Python, one Attend stream per node. Both gRPC polling engines and plain TCP sockets, the floor, take
turns of some tokens each. With more nodes every node is asked for every head (span placement),
which is the most messages a step can need.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from benchmarks.report import Report, argument_parser
from benchmarks.rpc_client import LAYERS, Stages
from benchmarks.rpc_node import HEAD_DIM, KV_HEADS, Q_HEADS, REPLY_BYTES, REQUEST_BYTES

NODE_COUNTS = (1, 2, 4)
TOKEN_BUDGET_MS = 10.0
WARM_UP_TOKENS = 5
POLLING = "-event_engine_client,-event_engine_listener"
# GRPC_EXPERIMENTS of each transport's processes; it is read when grpc is imported.
TRANSPORTS = {"stream, polling": POLLING, "stream, event engine": "", "plain TCP": ""}
STAGES = ("send", "queue", "search", "attend", "node_merge", "transport", "merge")


@contextmanager
def python_process(
    module: str, *arguments: str, experiments: str
) -> Iterator[subprocess.Popen[str]]:
    """A Python process with pipes; it is ended on the way out."""
    environment = {**os.environ, "GRPC_EXPERIMENTS": experiments, "GRPC_VERBOSITY": "ERROR"}
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def read_line(process: subprocess.Popen[str]) -> str:
    """The next line of a process's stdout; raises when it ended instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(
            f"process {process.pid} ended with {process.wait()}; see its stderr above"
        )
    return line


def start_transport(stack: ExitStack, transport: str) -> subprocess.Popen[str]:
    """Starts a transport's nodes, then its client."""
    experiments = TRANSPORTS[transport]
    node_kind, client_kind = ("floor", "floor") if transport == "plain TCP" else ("zero", "stream")
    nodes = [
        stack.enter_context(
            python_process("benchmarks.rpc_node", node_kind, experiments=experiments)
        )
        for _ in range(max(NODE_COUNTS))
    ]
    addresses = [read_line(node).split()[1] for node in nodes]
    return stack.enter_context(
        python_process("benchmarks.rpc_client", client_kind, *addresses, experiments=experiments)
    )


def measure(client: subprocess.Popen[str], nodes: int, tokens: int) -> list[Stages]:
    """Stage times of some tokens, microseconds summed over the layers."""
    assert client.stdin is not None
    client.stdin.write(f"{nodes} {tokens}\n")
    client.stdin.flush()
    measured: list[Stages] = json.loads(read_line(client))
    return measured


def run(rounds: int, tokens: int) -> dict[tuple[str, int], list[Stages]]:
    """Stage times by transport and number of nodes; transports take turns in every round."""
    measured: dict[tuple[str, int], list[Stages]] = {
        (transport, nodes): [] for nodes in NODE_COUNTS for transport in TRANSPORTS
    }
    with ExitStack() as stack:
        clients = {transport: start_transport(stack, transport) for transport in TRANSPORTS}
        for transport, nodes in measured:
            measure(clients[transport], nodes, WARM_UP_TOKENS)
        for _ in range(rounds):
            for (transport, nodes), found in measured.items():
                found.extend(measure(clients[transport], nodes, tokens))
    return measured


def median_of(tokens: Sequence[Stages], stage: str) -> float:
    """Median over tokens, microseconds per token."""
    return statistics.median(token[stage] for token in tokens)


def report_on(measured: dict[tuple[str, int], list[Stages]], report: Report) -> None:
    """Rows and targets from the measurements."""
    for (transport, nodes), tokens in measured.items():
        floor_us = median_of(measured["plain TCP", nodes], "total")
        total_us = median_of(tokens, "total")
        row: dict[str, object] = {"transport": transport, "nodes": nodes}
        row["token_ms"] = total_us / 1e3
        row["p90_ms"] = statistics.quantiles([t["total"] for t in tokens], n=10)[-1] / 1e3
        row["layer_us"] = total_us / LAYERS
        if "send" in tokens[0]:
            row.update({f"{stage}_us": median_of(tokens, stage) / LAYERS for stage in STAGES})
        row["floor_ratio"] = total_us / floor_us
        report.add(**row)
    report.at_most(
        f"{LAYERS} layers at one node, nothing computed",
        TOKEN_BUDGET_MS,
        median_of(measured["stream, polling", 1], "total") / 1e3,
        "ms",
        "client and node in pure Python on one machine's loopback, the way services run",
    )


def main() -> None:
    """Runs the benchmark from the command line."""
    arguments = argument_parser("rpc", __doc__ or "").parse_args()
    rounds, tokens = (4, 15) if arguments.quick else (12, 25)
    report = Report(
        "rpc",
        config={
            "layers": LAYERS,
            "q_heads": Q_HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "request_bytes": REQUEST_BYTES,
            "reply_bytes": REPLY_BYTES,
            "rounds": rounds,
            "tokens_per_round": tokens,
            "grpc_experiments": TRANSPORTS,
        },
        quick=arguments.quick,
    )
    report_on(run(rounds, tokens), report)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
