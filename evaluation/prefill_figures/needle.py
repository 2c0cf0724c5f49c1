"""`needle`: the needle test with the context prefilled by a sparse pattern, beside dense.

Only prefills are sparse: questions and answers attend every key (the methods `local/full@PATTERN`
of `longreach eval`).
"""

from __future__ import annotations

import argparse

from rich.progress import Progress, TaskID

from benchmarks.report import Report
from evaluation.encoding import load_encoder
from evaluation.fingerprint import model_fingerprint
from evaluation.methods import Deployment, Method, open_answerers, parse_methods
from evaluation.observations.reporting import finish, mean_over, progress_bar
from evaluation.plots import write_plots
from evaluation.results import ResultsFile
from evaluation.runner import Plan
from evaluation.runner import run as ask
from evaluation.tasks import TASKS


def run(given: argparse.Namespace) -> None:
    """Asks and writes needle.json, needle.csv and a heatmap for each pattern.

    Answers are kept in needle.jsonl: a run that was stopped goes on.
    """
    methods = tuple(prefill_method(pattern) for pattern in given.patterns)
    plan = Plan((TASKS["needle"],), tuple(given.lengths), methods, given.rounds, given.seed)
    config = {"model": model_fingerprint(given.model), "seed": given.seed}
    deployment = Deployment(given.model)
    with ResultsFile(given.out / "needle.jsonl", config) as store, progress_bar() as progress:
        watcher = _Watcher(progress, plan.size(plan.methods))
        ask(
            plan,
            load_encoder(given.model),
            lambda group: open_answerers(group, deployment),
            store,
            watcher,
        )
    report = Report("needle", {**config, "lengths": list(given.lengths), "rounds": given.rounds})
    names = {method.name: method.prefill for method in methods}
    for record in store.records:
        if record.method in names:
            report.add(
                pattern=names[record.method], length=record.length,
                depth=record.metadata["depth"], score=record.score, answer=record.answer,
            )  # fmt: skip
    write_plots(store.records, given.out / "needle")
    means = mean_over(report.results, ("pattern", "length"), ("score",))
    finish(report, given.out, {"score, mean over depths": means})


def prefill_method(pattern: str) -> Method:
    """Full attention over contexts that the pattern prefilled.

    Raises InvalidRequest for a pattern that does not exist.
    """
    return parse_methods([f"local/full@{pattern}"])[0]


class _Watcher:
    """Moves a progress bar over haystacks."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task("", total=total)

    def stage(self, text: str) -> None:
        """Shows what is being done."""
        self._progress.update(self._task, description=text)

    def answered(self, haystacks: int) -> None:
        """Moves on."""
        self._progress.advance(self._task, haystacks)
