"""What telemetry costs per generated token, on clusters of real processes with the demo model.

Three clusters, each a coordinator, a worker and two nodes, hold the same context and take turns of
some tokens each: two without telemetry, whose difference is what noise alone makes, and one with
all of it (metrics on /metrics, scraped, and to a collector, 1% of the requests traced, quality of
retrieval sampled). On the last one further turns have every request traced.

Two figures per turn: the mean time between tokens as the coordinator saw it, and the CPU time of
the cluster's processes per token, which other work on the machine disturbs less and which also
counts what happens beside the token path. Times are medians over rounds of a turn's time over that
of the two clusters without in the same round; CPU times are sums over all turns.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
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
ARMS = ("off", "off again", "on", "on, every request traced")


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
    """A cluster; with telemetry where there is a collector."""
    on = {"metrics_listen": "127.0.0.1:0", "otlp_endpoint": endpoint} if endpoint else {}
    return LocalCluster(
        MODEL,
        nodes=NODES,
        data_dir=folder,
        worker_flags={"threads": 1, **on},
        node_flags={"attend_threads": 1, **on},
        coordinator_flags=on,
    ).start()


def prepared(client: Client) -> str:
    """Stores the context and waits for its index; returns its id."""
    vocabulary = 1024
    tokens = [(17 * n * n + 31 * n) % vocabulary for n in range(CONTEXT_TOKENS)]
    context = client.contexts.create(tokens=tokens)
    while client.contexts.get(context.id).index_fraction < 1.0:
        time.sleep(0.1)
    return context.id


@dataclass(frozen=True, slots=True)
class Turn:
    """Milliseconds per token: between tokens, and of CPU time in all processes."""

    token_ms: float
    cpu_ms: float


def take_turn(cluster: LocalCluster, client: Client, context: str, tokens: int) -> Turn:
    """One generation."""
    before = cpu_s(cluster)
    answer = client.generate([1, 2, 3], context=context, max_tokens=tokens, ignore_eos=True)
    spent = cpu_s(cluster) - before
    return Turn(1e3 * answer.timing.per_token_s, 1e3 * spent / tokens)


def cpu_s(cluster: LocalCluster) -> float:
    """CPU seconds that the cluster's processes have used so far."""
    ticks = 0
    for member in cluster.members:
        fields = Path(f"/proc/{member.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def run(rounds: int, tokens: int) -> tuple[dict[str, list[Turn]], int]:
    """Each arm's turns, and how many spans were sent."""
    measured: dict[str, list[Turn]] = {arm: [] for arm in ARMS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoint, collector = stack.enter_context(collecting())
        with ThreadPoolExecutor(3) as pool:
            clusters = list(pool.map(start, (folder / name for name in "abc"), ("", "", endpoint)))
        for cluster in clusters:
            stack.callback(cluster.stop)
        clients = [stack.enter_context(each.client(timeout_s=120)) for each in clusters]
        contexts = [prepared(client) for client in clients]
        stack.enter_context(scraping(clusters[2]))
        for number in range(-1, rounds):
            for turn in range(len(ARMS)):
                arm = (turn + number) % len(ARMS)  # each round begins with another one
                place = min(arm, 2)
                traced = TRACEPARENT.format(1000 + number) if arm == 3 else ""
                clients[place]._metadata = (("traceparent", traced),) if traced else ()
                found = take_turn(clusters[place], clients[place], contexts[place], tokens)
                if number >= 0:  # the first round warms up
                    measured[ARMS[arm]].append(found)
        time.sleep(1.0)
    return measured, collector.spans


def time_overheads(measured: dict[str, list[Turn]]) -> dict[str, float]:
    """Of each arm, over the mean of the two without telemetry in the same round; medians."""
    pairs = zip(measured["off"], measured["off again"], strict=True)
    base = [(one.token_ms + other.token_ms) / 2 for one, other in pairs]
    return {
        arm: statistics.median(t.token_ms / b for t, b in zip(turns, base, strict=True)) - 1
        for arm, turns in measured.items()
    }


def cpu_overheads(measured: dict[str, list[Turn]]) -> dict[str, float]:
    """Of each arm, over the mean of the two without telemetry; over all rounds."""
    totals = {arm: sum(turn.cpu_ms for turn in turns) for arm, turns in measured.items()}
    base = (totals["off"] + totals["off again"]) / 2
    return {arm: total / base - 1 for arm, total in totals.items()}


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


def _each_us(work: Callable[[], None], times: int = 20_000) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return 1e6 * (time.perf_counter() - began) / times


def report_on(
    measured: dict[str, list[Turn]], spans: int, each_us: dict[str, float], report: Report
) -> None:
    """Rows and targets from the measurements."""
    times, cpu = time_overheads(measured), cpu_overheads(measured)
    for arm, turns in measured.items():
        report.add(
            what=f"telemetry {arm}",
            token_ms=statistics.median(turn.token_ms for turn in turns),
            cpu_ms_per_token=statistics.mean(turn.cpu_ms for turn in turns),
            token_overhead_share=times[arm],
            cpu_overhead_share=cpu[arm],
            spans=spans if arm == ARMS[3] else 0,
        )
    for what, cost_us in each_us.items():
        report.add(what=what, us_each=cost_us)
    noise = abs(times["off"] - times["off again"])
    report.at_most(
        "time between tokens with telemetry, over that without",
        OVERHEAD_LIMIT,
        times["on"],
        "more",
        f"the two clusters without differ by {noise:.3f}; CPU time per token, which includes the "
        f"sampling of quality beside the token path, is {cpu['on']:+.3f}",
    )


def main() -> None:
    """Runs the benchmark from the command line."""
    arguments = argument_parser("telemetry", __doc__ or "").parse_args()
    rounds, tokens = (16, 24) if arguments.quick else (60, 64)
    report = Report(
        "telemetry",
        config={
            "model": "models/demo",
            "context_tokens": CONTEXT_TOKENS,
            "nodes": NODES,
            "rounds": rounds,
            "tokens_per_turn": tokens,
            "scrape_s": SCRAPE_S,
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS", ""),
        },
        quick=arguments.quick,
    )
    measured, spans = run(rounds, tokens)
    report_on(measured, spans, measurement_us(), report)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
