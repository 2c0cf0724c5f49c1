"""The command line of the evaluation; see `python -m evaluation --help`."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.report import Report, print_report
from evaluation.encoding import load_encoder
from evaluation.fingerprint import model_fingerprint
from evaluation.methods import Deployment, open_answerers, parse_methods
from evaluation.report import fill_report, summary
from evaluation.results import ResultsFile
from evaluation.runner import Plan, run
from evaluation.tables import markdown
from evaluation.tasks import TASKS, Sources, select_tasks
from evaluation.tasks.haystack import load_essay
from longreach.errors import LongreachError
from longreach.logging import configure
from retrieval_node.index.base import INDEX_KINDS

log = logging.getLogger("evaluation")

QUICK_LIMIT_S = 240.0
_DEFAULTS: dict[str, Any] = {
    "tasks": ["ruler"],
    "lengths": [4096, 8192, 16384, 32768, 65536, 131072],
    "methods": ["full,cluster:top_k=100"],
    "n": 20,
}
_QUICK: dict[str, Any] = {
    "tasks": ["mixed_noise", "niah_multikey_2", "vt", "passkey"],
    "lengths": [4096],
    "methods": ["full,cluster:exact,cluster:top_k=100"],
    "n": 3,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks; returns the exit status."""
    configure()
    given = _parse(argv)
    try:
        return _evaluate(given)
    except LongreachError as error:
        log.error("%s", error.message)
        return 2


def _evaluate(given: argparse.Namespace) -> int:
    plan = Plan(
        tasks=tuple(select_tasks(_words(given.tasks))),
        lengths=tuple(sorted(set(given.lengths))),
        methods=tuple(parse_methods(given.methods)),
        n=given.n,
        seed=given.seed,
        sources=Sources(given.essay, given.squad, given.hotpotqa, given.infinitebench),
    )
    deployment = Deployment(
        given.model, given.address, given.nodes, given.sink_tokens, given.window_tokens
    )
    encoder = load_encoder(given.model)
    configuration = _configuration(plan, deployment)
    with (
        ResultsFile(given.json.with_suffix(".jsonl"), configuration) as store,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        ) as progress,
    ):
        complete = run(
            plan,
            encoder,
            lambda group: open_answerers(group, deployment),
            store,
            _Bar(progress, plan.size),
            QUICK_LIMIT_S if given.quick else None,
        )
        _report(given, plan, store, complete)
    return 0


class _Bar:
    """A progress bar over haystacks."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total)

    def stage(self, text: str) -> None:
        """Shows what is being done."""
        self._progress.update(self._task, description=text)

    def answered(self, haystacks: int) -> None:
        """Moves on."""
        self._progress.advance(self._task, haystacks)


def _report(given: argparse.Namespace, plan: Plan, store: ResultsFile, complete: bool) -> None:
    from evaluation.plots import write_plots

    asked = {
        "tasks": [task.name for task in plan.tasks],
        "lengths": list(plan.lengths),
        "methods": [method.name for method in plan.methods],
        "n": plan.n,
        "greedy": True,
    }
    report = Report("evaluation", {**store.configuration, **asked}, quick=given.quick)
    fill_report(report, store.records)
    if not complete:
        report.skip("haystacks", f"the time limit of {QUICK_LIMIT_S:g} s of --quick was reached")
    stem = given.json.with_suffix("")
    stem.with_suffix(".md").write_text(markdown(report, store.records), encoding="utf-8")
    write_plots(store.records, stem)
    given.json.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    print_report(summary(report))


def _configuration(plan: Plan, deployment: Deployment) -> dict[str, Any]:
    """What makes answers comparable; a results file holds one such configuration."""
    return {
        "model": model_fingerprint(deployment.model),
        "seed": plan.seed,
        "essay": load_essay(plan.sources.essay).name,
        "cluster": deployment.address or f"local, {deployment.nodes} nodes",
        "sink_tokens": None if deployment.address else deployment.sink_tokens,
        "window_tokens": None if deployment.address else deployment.window_tokens,
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation",
        description=(
            "Measures how well methods answer over long contexts, on the same samples as full\n"
            "attention. Samples are made here, with the model's own tokenizer, to exact lengths."
        ),
        epilog=_lesson(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="models/demo", help="directory or hub name (default %(default)s)")
    add("--tasks", nargs="+", metavar="NAME", help="tasks or suites (below); default ruler")
    add("--lengths", nargs="+", type=_length, metavar="TOKENS", help="such as 4K or 32768")
    add("--methods", nargs="+", metavar="METHOD", help="below; default full,cluster:top_k=100")
    add("--n", type=_count, help="rounds: haystacks per task, length and method; default 20")
    add("--seed", type=int, default=0, help="another seed gives other samples")
    add("--json", type=Path, required=True, metavar="PATH", help="report; see Files below")
    add("--quick", action="store_true", help="small defaults; stops asking after 4 minutes")
    add("--address", default="", metavar="HOST:PORT", help="of a running cluster with this model")
    add("--nodes", type=_count, default=2, help="of a cluster started here (default 2)")
    add("--sink-tokens", type=int, default=128, help="first tokens kept on the worker")
    add("--window-tokens", type=int, default=512, help="last tokens kept on the worker")
    add("--essay", type=Path, metavar="FILE", help="long text to hide needles in")
    add("--squad", type=Path, metavar="FILE", help="SQuAD v2 JSON, for qa_1")
    add("--hotpotqa", type=Path, metavar="FILE", help="HotpotQA JSON, for qa_2")
    add("--infinitebench", type=Path, metavar="DIR", help="InfiniteBench's JSONL files")
    given = parser.parse_args(argv)
    for name, value in (_QUICK if given.quick else _DEFAULTS).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def _lesson() -> str:
    tasks = "\n".join(f"  {name:20} {TASKS[name].suite:20} {TASKS[name].summary}" for name in TASKS)
    return f"""\
Methods:
  full                   full attention, in this process: always include it, it is the yardstick
  cluster:BUDGET         a cluster is started here, or used at --address
  cluster/INDEX:BUDGET   the same with an index kind: {", ".join(INDEX_KINDS)}
  BUDGET is exact, top_k=100, mass=0.98, mass=0.98[64,4096] or beta=8, with +tail for an estimate
  of the keys left out. Separate methods by commas or spaces.

Tasks (name, suite, what is asked):
{tasks}

Files, for --json out/run.json:
  out/run.json     figures, configuration, machine, targets
  out/run.md       tables in the papers' layout
  out/run.jsonl    every answer, written at once; the same command goes on where it was stopped,
                   and more tasks, lengths, methods or a larger --n add to it
  out/run.*.png    curves over length, needle heatmaps (with .csv)

Examples:
  python -m evaluation --quick --json out/quick.json
  python -m evaluation --tasks needle --lengths 4K 8K 16K 32K --n 1 --json out/needle.json
  python -m evaluation --tasks ruler infinitebench --lengths 32K --n 50 \\
      --methods full cluster:exact cluster/hnsw:top_k=100 'cluster:mass=0.98[64,4096]' \\
      --json out/table.json

Reading the figures: `difference` is the method's score minus full attention's on the same
questions, with a 95% interval; `better` and `worse` count questions that only one of them answered.
A small n cannot show a small loss: 0 worse of 36 still allows a loss of 10 points.
"""


def _length(text: str) -> int:
    match = re.fullmatch(r"(\d+)([Kk]?)", text)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a length; write 4096 or 4K")
    return int(match[1]) * (1024 if match[2] else 1)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _words(texts: Sequence[str]) -> list[str]:
    return [word for text in texts for word in text.split(",") if word]


if __name__ == "__main__":
    sys.exit(main())
