"""Runs the tour: cluster, document, questions, report. Exit status 1 if an answer is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import rich.markup
from rich.console import Console

from longreach.cli.progress import context_bar
from longreach.errors import InvalidRequest, LongreachError
from longreach.local_cluster import DEFAULT_DATA_DIR, LocalCluster, raise_on_sigterm
from longreach.quickstart.document import FACTS, Document, HiddenFact, build_document
from longreach.quickstart.report import Answer, Report
from longreach.quickstart.verification import full_attention_answers
from longreach.sdk import Client, Context

_DOCUMENT_TOKENS = 105_000
_MAX_TOKENS = 16
_STOP = "."
_NODES = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tour and returns its exit status."""
    arguments = _parse(argv)
    raise_on_sigterm()
    console = Console(highlight=False)
    try:
        report = _tour(arguments, console)
    except LongreachError as error:
        console.print("[red]failed:[/]", rich.markup.escape(error.message), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    report.write(arguments.report)
    console.print()
    report.print(console)
    console.print(f"\nThe same figures are in {arguments.report}.")
    if not report.right:
        console.print("[red]An answer is not what was hidden in the document.[/]")
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m longreach.quickstart",
        description="Asks a small model about a document of more than 100,000 tokens, on this "
        "machine, and checks the answers.",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also answer with full attention, and compare (minutes)",
    )
    parser.add_argument("--report", type=Path, default=Path("run-report.json"), metavar="FILE")
    parser.add_argument("--model", default="models/demo", metavar="DIR")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=DEFAULT_DATA_DIR,
        metavar="DIR",
        help="kept: a second run finds the document there (default %(default)s)",
    )
    parser.add_argument(
        "--prefill",
        default="adaptive",
        metavar="PATTERN",
        help="how the document's attention is computed: dense, or a sparse pattern such as "
        "adaptive, vertical_slash:verticals=500,slashes=1500 (default %(default)s)",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help="of the model and its KV (default %(default)s)"
    )
    parser.add_argument("--document-tokens", type=int, default=_DOCUMENT_TOKENS, metavar="N")
    return parser.parse_args(argv)


def _tour(arguments: argparse.Namespace, console: Console) -> Report:
    if not Path(arguments.model, "config.json").exists():
        raise InvalidRequest(
            f"there is no model in {arguments.model}; run this in the repository's root, where "
            "models/demo is, or name a directory with --model"
        )
    document = build_document(Path(arguments.model, "tokenizer.json"), arguments.document_tokens)
    console.print(f"document: {document.tokens:,} tokens, {document.source}")
    console.print(
        f"starting a coordinator, a worker and {_NODES} nodes; logs in "
        f"{arguments.data_dir / 'logs'}"
    )
    cluster = LocalCluster(
        arguments.model,
        nodes=_NODES,
        data_dir=arguments.data_dir,
        worker_flags={"prefill_pattern": arguments.prefill, "dtype": arguments.dtype},
    )
    with cluster, Client(cluster.address) as client:
        report = _answer_all(client, document, console)
    report = dataclasses.replace(report, prefill=arguments.prefill, dtype=arguments.dtype)
    if arguments.verify:
        report = _verified(report, arguments.model, document, console)
    return report


def _answer_all(client: Client, document: Document, console: Console) -> Report:
    started = time.monotonic()
    with context_bar(console, "ingest", "prefill") as show:
        context = client.contexts.create(text=document.text, name="quickstart", on_progress=show)
    ingest_s = time.monotonic() - started
    early = None
    if context.found:
        console.print(f"found: this document was stored by an earlier run ({ingest_s:.2f} s)")
    if not client.contexts.get(context).indexed:
        console.print("answered while the index builds, by exact search:")
        early = _ask(client, context, FACTS[0], console)
    with context_bar(console, "index", "index") as show:
        indexed = client.contexts.wait_indexed(context, on_progress=show)
    index_ready_s = time.monotonic() - started
    console.print("the index is ready; three questions:")
    answers = tuple(_ask(client, context, fact, console) for fact in FACTS)
    return Report(
        context=dataclasses.replace(indexed, found=context.found),
        source=document.source,
        ingest_s=ingest_s,
        index_ready_s=index_ready_s,
        answers=answers,
        nodes=sum(member.kind == "node" for member in client.status().members),
        early=early,
    )


def _ask(client: Client, context: Context, fact: HiddenFact, console: Console) -> Answer:
    """Streams one answer to the console."""
    console.print(f"  [dim]{fact.question.strip()}[/]", end="", soft_wrap=True)
    started = time.monotonic()
    ttft_s = 0.0
    stream = client.stream(fact.question, context=context, max_tokens=_MAX_TOKENS, stop=_STOP)
    with stream:
        for token in stream:
            ttft_s = ttft_s or time.monotonic() - started
            console.print(token.text, end="", markup=False, style="bold", soft_wrap=True)
        generation = stream.summary
    console.print()
    return Answer(fact.question.strip(), fact.answer, generation, ttft_s)


def _verified(report: Report, model: str, document: Document, console: Console) -> Report:
    """The report with full attention's answers beside the cluster's."""
    questions = [fact.question for fact in FACTS]
    with console.status("answering with full attention, to compare"):
        started = time.monotonic()
        reference = full_attention_answers(
            model, document.text, questions, max_tokens=_MAX_TOKENS, stop=_STOP
        )
    console.print(f"full attention answered in {time.monotonic() - started:.0f} s")
    pairs = zip(report.answers, reference, strict=True)
    answers = tuple(dataclasses.replace(each, full_attention_answer=text) for each, text in pairs)
    return dataclasses.replace(report, answers=answers)


if __name__ == "__main__":
    sys.exit(main())
