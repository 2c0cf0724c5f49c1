"""Processes side by side give the answers of one, keep what there is, and say what went wrong."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.encoding import load_encoder
from evaluation.methods import Deployment, open_answerers, parse_methods
from evaluation.results import ResultsFile
from evaluation.runner import Plan, run
from evaluation.side_by_side import run_side_by_side, units_of
from evaluation.tasks import select_tasks
from evaluation.tasks.base import Sources
from longreach.errors import InvalidRequest

WORDS = ("full", "local/auto:top_k=20+tail", "local/full@a_shape")


class Count:
    """A watcher that counts."""

    def __init__(self) -> None:
        self.count = 0

    def stage(self, text: str) -> None:
        """Not looked at."""

    def answered(self, haystacks: int) -> None:
        self.count += haystacks


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> str:
    return str(tiny_model("llama"))


def plan_of(words: tuple[str, ...], *, length: int = 900, n: int = 2) -> Plan:
    tasks = tuple(select_tasks(["passkey", "number_string"]))
    return Plan(tasks, (length,), tuple(parse_methods(words)), n, sources=Sources())


def test_two_processes_give_the_answers_of_one_and_go_on_where_it_stopped(
    model: str, tmp_path: Path
) -> None:
    plan, deployment = plan_of(WORDS), Deployment(model)
    with ResultsFile(tmp_path / "one.jsonl", {}) as alone:
        opened = functools.partial(open_answerers, deployment=deployment)
        assert run(plan, load_encoder(model), opened, alone, Count())
    answers = {record.key: record.answer for record in alone.records}
    assert len(answers) == plan.size(plan.methods)

    with ResultsFile(tmp_path / "two.jsonl", {}) as store:
        kept = next(record for record in alone.records if record.method == "full")
        store.append(kept)
        watcher = Count()
        run_side_by_side(plan, deployment, store, watcher, processes=2)
        assert watcher.count == plan.size(plan.methods)
        assert {record.key: record.answer for record in store.records} == answers
        assert units_of(plan, store, 2) == []
        again = Count()
        run_side_by_side(plan, deployment, store, again, processes=2)
        assert again.count == plan.size(plan.methods)
    lines = (tmp_path / "two.jsonl").read_text().splitlines()
    assert sum('"method"' in line for line in lines) == plan.size(plan.methods), (
        "nothing was asked twice"
    )


def test_units_share_a_prefill_and_the_longest_come_first(tmp_path: Path) -> None:
    words = ("full", *(f"local/auto:top_k={k}" for k in range(1, 5)), "local/full@a_shape")
    plan = dataclasses.replace(plan_of(words, n=2), lengths=(900, 1800), limits={words[1]: 900})
    with ResultsFile(tmp_path / "a.jsonl", {}) as store:
        for processes, sizes in ((2, [4, 1]), (4, [2, 2, 1])):
            units = units_of(plan, store, processes)
            assert [unit.length for unit in units] == sorted(u.length for u in units)[::-1]
            assert all(len({method.prefill for method in u.methods}) == 1 for u in units)
            longest = [u for u in units if (u.task, u.length, u.index) == ("passkey", 1800, 1)]
            assert [len(unit.methods) for unit in longest] == sizes
            asked = [(m.name, u.task, u.length, u.index) for u in units for m in u.methods]
            assert len(asked) == len(set(asked)) == plan.size(plan.methods)


def test_what_a_process_raises_is_raised_and_its_answers_are_kept(
    model: str, tmp_path: Path
) -> None:
    plan = plan_of(("full",), length=1 << 20)
    with (
        ResultsFile(tmp_path / "a.jsonl", {}) as store,
        pytest.raises(InvalidRequest, match="accepts"),
    ):
        run_side_by_side(plan, Deployment(model), store, Count(), processes=2)
