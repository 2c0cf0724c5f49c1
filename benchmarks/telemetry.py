"""What telemetry costs per generated token, on a cluster of real processes with the demo model.

While one generation goes on, the instruments and spans of coordinator, worker and nodes are turned
off and on again every few tokens (`benchmarks/switchable.py`): the same processes at nearly the
same time, since two clusters, or a minute on a busy machine, differ by more than telemetry costs.
With telemetry means: metrics on /metrics, scraped, and to a collector, and 1% of the requests
traced. The sampling of quality, which has a CPU budget of its own beside the token path, is off.

Two figures per block of tokens: the median time between two as the client saw it, and the CPU time
of all processes per token. Overheads are medians over rounds of a block's figure over the mean of
the two blocks without telemetry in the same round; the difference of those two is the noise. Short
generations of which every step is traced take turns with others that are not: what a trace costs.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import threading
import time
import timeit
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from benchmarks.report import Report, argument_parser
from benchmarks.switchable import make_switchable, switch
from coordinator.request_trace import STEPS_FIRST
from longreach import telemetry
from longreach.local_cluster import LocalCluster
from longreach.sdk import Client
from longreach.telemetry import instruments

MODEL = Path(__file__).resolve().parent.parent / "models" / "demo"
CONTEXT_TOKENS = 4096
NODES = 2
OVERHEAD_LIMIT = 0.02
SCRAPE_S = 5.0
"""Prometheus's usual interval is three times as long."""
TRACEPARENT = "00-{:032x}-00f067aa0ba902b7-01"
ARMS = ("off", "on", "off again")
TRACED = ("steps not traced", "steps traced")
BLOCK_TOKENS = 8
SETTLE_TOKENS = 2
"""Tokens after a switch that are not counted: they were on their way."""


class Collector(
    metrics_service_pb2_grpc.MetricsServiceServicer, trace_service_pb2_grpc.TraceServiceServicer
):
    """Takes metrics and spans, and counts the spans."""

    def __init__(self) -> None:
        self.spans = 0

    def Export(self, request, context):  # type: ignore[no-untyped-def]  # noqa: N802
        """Of both services."""
        if isinstance(request, metrics_service_pb2.ExportMetricsServiceRequest):
            return metrics_service_pb2.ExportMetricsServiceResponse()
        self.spans += sum(
            len(inner.spans) for each in request.resource_spans for inner in each.scope_spans
        )
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def collecting() -> Iterator[tuple[str, Collector]]:
    """A collector on a free port: its endpoint and itself."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", collector
    finally:
        server.stop(None).wait()


@contextmanager
def scraping(cluster: LocalCluster) -> Iterator[None]:
    """Reads /metrics of every process now and then, as Prometheus does."""
    stopping = threading.Event()
    urls = [member.metrics_url for member in cluster.members]

    def scrape() -> None:
        while not stopping.wait(SCRAPE_S):
            for url in urls:
                with urllib.request.urlopen(url, timeout=10) as reply:
                    reply.read()

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def start(folder: Path, endpoint: str) -> LocalCluster:
    """A cluster with telemetry, which can be turned off."""
    on = {"metrics_listen": "127.0.0.1:0", "otlp_endpoint": endpoint}
    cluster = LocalCluster(
        MODEL,
        nodes=NODES,
        data_dir=folder,
        worker_flags={"threads": 1, **on},
        node_flags={"attend_threads": 1, "quality_sample_share": 0, **on},
        coordinator_flags=on,
    )
    return make_switchable(cluster).start()


def prepared(client: Client) -> str:
    """Stores the context and waits for its index; returns its id."""
    vocabulary = 1024
    tokens = [(17 * n * n + 31 * n) % vocabulary for n in range(CONTEXT_TOKENS)]
    context = client.contexts.create(tokens=tokens)
    while client.contexts.get(context.id).index_fraction < 1.0:
        time.sleep(0.1)
    return context.id


@dataclass(frozen=True, slots=True)
class Block:
    """Milliseconds per token: between two, and of CPU time in all processes."""

    token_ms: float
    cpu_ms: float


def take_block(cluster: LocalCluster, stream: Iterator[object], tokens: int) -> Block:
    """Reads some tokens of a generation."""
    before, began = cpu_s(cluster), time.perf_counter()
    at = [began, *(time.perf_counter() for _ in itertools.islice(stream, tokens))]
    spent = cpu_s(cluster) - before
    token_s = statistics.median(later - one for one, later in itertools.pairwise(at))
    return Block(1e3 * token_s, 1e3 * spent / tokens)


def cpu_s(cluster: LocalCluster) -> float:
    """CPU seconds that the cluster's processes have used so far."""
    # Linux's clock of another process (clock_getcpuclockid), exact where /proc counts in ticks.
    return sum(time.clock_gettime(~member.pid << 3 | 2) for member in cluster.members)


def alternate(
    cluster: LocalCluster, client: Client, context: str, rounds: int
) -> dict[str, list[Block]]:
    """Blocks of one generation, telemetry off and on in turns."""
    measured: dict[str, list[Block]] = {arm: [] for arm in ARMS}
    tokens = (rounds + 1) * len(ARMS) * (SETTLE_TOKENS + BLOCK_TOKENS) + 1
    with client.stream([1, 2, 3], context=context, max_tokens=tokens, ignore_eos=True) as stream:
        for number in range(-1, rounds):  # the first round warms up
            for turn in range(len(ARMS)):
                arm = ARMS[(turn + number) % len(ARMS)]  # each round begins with another one
                for member in cluster.members:
                    switch(member, arm == "on")
                for _ in itertools.islice(stream, SETTLE_TOKENS):
                    pass
                block = take_block(cluster, stream, BLOCK_TOKENS)
                if number >= 0:
                    measured[arm].append(block)
    return measured


def trace_some(
    cluster: LocalCluster, client: Client, context: str, rounds: int
) -> dict[str, list[Block]]:
    """Short generations, of which every other one has all of its steps traced."""
    measured: dict[str, list[Block]] = {arm: [] for arm in TRACED}
    for member in cluster.members:
        switch(member, True)
    for number in range(rounds):
        for turn in range(len(TRACED)):
            arm = TRACED[(turn + number) % len(TRACED)]
            traced = (("traceparent", TRACEPARENT.format(1000 + number)),)
            client._metadata = traced if arm == TRACED[1] else ()
            with client.stream([1], context=context, max_tokens=STEPS_FIRST) as stream:
                next(stream)
                measured[arm].append(take_block(cluster, stream, STEPS_FIRST - 1))
    client._metadata = ()
    return measured


def run(rounds: int) -> tuple[dict[str, list[Block]], dict[str, list[Block]], int]:
    """Blocks by arm, those of traced and other generations, and how many spans were sent."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoint, collector = stack.enter_context(collecting())
        cluster = start(folder, endpoint)
        stack.callback(cluster.stop)
        client = stack.enter_context(cluster.client(timeout_s=120))
        context = prepared(client)
        stack.enter_context(scraping(cluster))
        measured = alternate(cluster, client, context, rounds)
        traced = trace_some(cluster, client, context, max(4, rounds // 4))
        time.sleep(1.0)
        return measured, traced, collector.spans


def overheads(measured: dict[str, list[Block]], figure: str) -> dict[str, float]:
    """Of each arm, over the mean of the two without telemetry in the same round; medians."""
    values = {arm: [getattr(block, figure) for block in blocks] for arm, blocks in measured.items()}
    pairs = zip(values["off"], values["off again"], strict=True)
    base = [(one + other) / 2 for one, other in pairs]
    return {
        arm: statistics.median(v / b for v, b in zip(each, base, strict=True)) - 1
        for arm, each in values.items()
    }


def measurement_us() -> dict[str, float]:
    """What one measurement costs, microseconds: ours off and on, and the SDK's."""
    series = telemetry.histogram("attend_seconds").bind()
    found = {"histogram, off": _each_us(lambda: series.record(0.003))}
    instruments.switch_on("node", {"engine": "benchmark"})
    found["histogram, on"] = _each_us(lambda: series.record(0.003))
    instruments.switch_off()
    meter = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False).get_meter("benchmark")
    sdk = meter.create_histogram("attend_seconds")
    labels = {"engine": "benchmark"}
    found["histogram of OpenTelemetry's SDK"] = _each_us(lambda: sdk.record(0.003, labels))
    return found


def _each_us(work: Callable[[], None], times: int = 2_000) -> float:
    """The best of several runs: what else the machine did is not of interest."""
    return 1e6 * min(timeit.repeat(work, number=times, repeat=20)) / times


def report_on(
    measured: dict[str, list[Block]],
    traced: dict[str, list[Block]],
    spans: int,
    each_us: dict[str, float],
    report: Report,
) -> None:
    """Rows and targets from the measurements."""
    times, cpu = overheads(measured, "token_ms"), overheads(measured, "cpu_ms")
    for arm, blocks in measured.items():
        report.add(
            what=f"telemetry {arm}",
            **_medians(blocks),
            token_overhead_share=times[arm],
            cpu_overhead_share=cpu[arm],
        )
    for arm, blocks in traced.items():
        report.add(what=arm, **_medians(blocks), spans=spans if arm == TRACED[1] else 0)
    for what, cost_us in each_us.items():
        report.add(what=what, us_each=cost_us)
    for name, found in (("time between tokens", times), ("CPU time per token", cpu)):
        noise = abs(found["off"] - found["off again"])
        report.at_most(
            f"{name} with telemetry, over that without",
            OVERHEAD_LIMIT,
            found["on"],
            "more",
            f"blocks without telemetry differ by {noise:.3f}",
        )


def _medians(blocks: list[Block]) -> dict[str, float]:
    return {
        "token_ms": statistics.median(block.token_ms for block in blocks),
        "cpu_ms_per_token": statistics.median(block.cpu_ms for block in blocks),
    }


def main() -> None:
    """Runs the benchmark from the command line."""
    arguments = argument_parser("telemetry", __doc__ or "").parse_args()
    rounds = 40 if arguments.quick else 300
    report = Report(
        "telemetry",
        config={
            "model": "models/demo",
            "context_tokens": CONTEXT_TOKENS,
            "nodes": NODES,
            "rounds": rounds,
            "block_tokens": BLOCK_TOKENS,
            "scrape_s": SCRAPE_S,
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
        },
        quick=arguments.quick,
    )
    measured, traced, spans = run(rounds)
    report_on(measured, traced, spans, measurement_us(), report)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
