"""What a session notices of another document's prefill, on a local cluster of real processes.

A session over a short context generates, first alone, then while a long document is ingested. Times
are those between two tokens at the client. The worker runs the session's steps between the chunks
of the prefill and keeps chunks near `prefill_shared_chunk_ms` for as long as a session decodes.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import Report, argument_parser
from longreach.local_cluster import LocalCluster
from longreach.quickstart.document import FACTS, build_document
from longreach.sdk import Client, Context

_TURN_TOKENS = 16


def gaps_while(client: Client, context: Context, going: Callable[[], bool]) -> list[float]:
    """Seconds between tokens, of answers asked for one after the other for as long as `going`."""
    gaps: list[float] = []
    while going():
        before = 0.0
        with client.stream(FACTS[1].question, context=context, max_tokens=_TURN_TOKENS) as stream:
            for _ in stream:
                now = time.perf_counter()
                if before:
                    gaps.append(now - before)
                before = now
    return gaps


def measure(report: Report, model: str, prefill: str, tokens: int, alone_s: float) -> None:
    """One prefill pattern in a cluster of its own."""
    tokenizer = Path(model, "tokenizer.json")
    short, long = build_document(tokenizer, 4096).text, build_document(tokenizer, tokens).text
    with (
        tempfile.TemporaryDirectory() as directory,
        LocalCluster(
            model, nodes=1, data_dir=Path(directory), worker_flags={"prefill_pattern": prefill}
        ) as cluster,
        Client(cluster.address) as client,
    ):
        context = client.contexts.create(text=short, name="short")
        client.contexts.wait_indexed(context)
        until = time.perf_counter() + alone_s
        alone = gaps_while(client, context, lambda: time.perf_counter() < until)
        ingest = threading.Thread(target=lambda: client.contexts.create(text=long, name="long"))
        began = time.perf_counter()
        ingest.start()
        shared = gaps_while(client, context, ingest.is_alive)
        ingest.join()
        ingest_s = time.perf_counter() - began
    for name, gaps in (("alone", alone), ("during the prefill", shared)):
        report.add(
            prefill=prefill, tokens=tokens, session=name, gaps=len(gaps),
            median_ms=statistics.median(gaps) * 1e3,
            p90_ms=statistics.quantiles(gaps, n=10)[-1] * 1e3, max_ms=max(gaps) * 1e3,
            ingest_s=ingest_s,
        )  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argument_parser("prefill_shared", __doc__ or "")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--prefills", nargs="+", default=["adaptive", "dense"])
    arguments = parser.parse_args()
    tokens = 12_288 if arguments.quick else arguments.tokens
    alone_s = 3.0 if arguments.quick else 10.0
    report = Report(
        "prefill_shared", {"tokens": tokens, "model": arguments.model}, quick=arguments.quick
    )
    for prefill in arguments.prefills:
        measure(report, arguments.model, prefill, tokens, alone_s)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
