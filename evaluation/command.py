"""Runs what the flags of `longreach eval` ask for and writes its files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.report import Report, print_report
from evaluation.defaults import DEFAULT, DEFAULT_JOBS, QUICK, QUICK_LIMIT_S
from evaluation.diffuse import DIFFUSE, KEYS, QUICK_KEYS, add_diffuse
from evaluation.encoding import load_encoder
from evaluation.fingerprint import file_fingerprint, model_fingerprint
from evaluation.methods import Deployment, open_answerers, parse_methods
from evaluation.report import fill_report, pooled_rows, summary
from evaluation.results import ResultsFile
from evaluation.runner import Plan
from evaluation.runner import run as ask
from evaluation.side_by_side import run_side_by_side
from evaluation.tables import markdown
from evaluation.tasks import Sources, select_tasks
from evaluation.tasks.haystack import load_essay
from longreach.errors import InvalidRequest
from longreach.logging import configure


def run(given: argparse.Namespace) -> int:
    """Does what the flags ask (longreach/cli/eval.py); returns the exit status.

    Raises InvalidRequest for wrong flags, before anything is started.
    """
    configure()
    if given.list:
        from evaluation.listing import listing

        print(listing())
    elif given.page is not None:
        from evaluation.page import write_page

        write_page(given.json, given.page)
    else:
        _evaluate(given)
    return 0


def _evaluate(given: argparse.Namespace) -> None:
    if len(given.json) > 1:
        raise InvalidRequest(f"a run writes one report; --json names {len(given.json)}")
    path: Path = given.json[0]
    plan, deployment = _plan(given), _deployment(given)
    for task in plan.tasks:
        task.check(plan.sources)
    encoder = load_encoder(given.model)
    with (
        ResultsFile(path.with_suffix(".jsonl"), _configuration(plan, deployment)) as store,
        _progress() as progress,
    ):
        bar = _Bar(progress, plan.size(plan.methods))
        limit_s = QUICK_LIMIT_S if given.quick else None
        jobs = 1 if given.quick else given.jobs or min(DEFAULT_JOBS, os.cpu_count() or 1)
        left = plan
        if jobs > 1:
            here, left = _split(plan)
            run_side_by_side(here, deployment, store, bar, jobs)
        complete = ask(
            left, encoder, lambda group: open_answerers(group, deployment), store, bar, limit_s
        )
    report = Report("evaluation", {**store.configuration, **_asked(plan)}, quick=given.quick)
    fill_report(report, store.records, store.elapsed_s)
    if DIFFUSE in _asked_tasks(given):
        add_diffuse(report, QUICK_KEYS if given.quick else KEYS)
    for name, longest in plan.limits.items():
        if plan.lengths[-1] > longest:
            report.skip(
                f"{name} beyond {longest // 1024}K",
                "it would take most of the default report's time; name it to have it asked",
            )
    if not complete:
        report.skip("haystacks", f"the time limit of {QUICK_LIMIT_S:g} s of --quick was reached")
    _write(report, store, path)


def _split(plan: Plan) -> tuple[Plan, Plan]:
    """The methods that run in one process each, and those that need a cluster."""
    here = tuple(method for method in plan.methods if method.runs_here)
    others = tuple(method for method in plan.methods if not method.runs_here)
    return dataclasses.replace(plan, methods=here), dataclasses.replace(plan, methods=others)


def _plan(given: argparse.Namespace) -> Plan:
    chosen = QUICK if given.quick else DEFAULT
    return Plan(
        tasks=tuple(select_tasks([word for word in _asked_tasks(given) if word != DIFFUSE])),
        lengths=tuple(sorted(set(given.lengths or chosen.lengths))),
        methods=tuple(parse_methods(given.methods or chosen.methods)),
        n=given.n or chosen.n,
        seed=given.seed,
        sources=Sources(given.essay, given.squad, given.hotpotqa, given.infinitebench),
        limits=_limits(given),
    )


def _limits(given: argparse.Namespace) -> dict[str, int]:
    """What the default report leaves out; nothing of what was named."""
    if given.tasks or given.methods or given.quick:
        return {}
    return dict(DEFAULT.limits)


def _asked_tasks(given: argparse.Namespace) -> list[str]:
    return _words(given.tasks or (QUICK if given.quick else DEFAULT).tasks)


def _deployment(given: argparse.Namespace) -> Deployment:
    return Deployment(
        given.model, given.address or "", given.nodes, given.sink_tokens, given.window_tokens
    )


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


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


def _configuration(plan: Plan, deployment: Deployment) -> dict[str, Any]:
    """What makes answers comparable; a results file holds one such configuration."""
    files = {
        name: file_fingerprint(path)
        for name in ("squad", "hotpotqa")
        if (path := getattr(plan.sources, name)) is not None
    }
    return {
        "model": model_fingerprint(deployment.model),
        "seed": plan.seed,
        "essay": load_essay(plan.sources.essay).name,
        "cluster": deployment.address or f"local, {deployment.nodes} nodes",
        "sink_tokens": None if deployment.address else deployment.sink_tokens,
        "window_tokens": None if deployment.address else deployment.window_tokens,
        **files,
    }


def _asked(plan: Plan) -> dict[str, Any]:
    return {
        "command": shlex.join(["longreach", "eval", *_flags(sys.argv[1:])]),
        "tasks": [task.name for task in plan.tasks],
        "lengths": list(plan.lengths),
        "methods": [method.name for method in plan.methods],
        "configurations": {m.name: m.configuration for m in plan.methods if m.local},
        "n": plan.n,
        "greedy": True,
        "ended": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _flags(words: Sequence[str]) -> Sequence[str]:
    """The flags, whether `longreach eval` or `python -m evaluation` was called."""
    return words[1:] if words[:1] == ["eval"] else words


def _write(report: Report, store: ResultsFile, path: Path) -> None:
    from evaluation.plots import needle_grids, write_plots

    stem = path.with_suffix("")
    written = report.as_json() | {
        "pooled": pooled_rows(store.records),
        "needle": needle_grids(store.records),
    }
    path.write_text(json.dumps(written, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(report, store.records), encoding="utf-8")
    write_plots(store.records, stem)
    print_report(summary(report))


def _words(texts: Sequence[str]) -> list[str]:
    return [word for text in texts for word in text.split(",") if word]
