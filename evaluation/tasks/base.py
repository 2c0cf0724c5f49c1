"""What a task is: it makes haystacks of exact token lengths, and questions about them."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from evaluation.encoding import Encoder
from longreach.errors import InvalidRequest
from longreach.registry import Registry


@dataclass(frozen=True, slots=True)
class Sample:
    """One question over one context.

    context_ids: the prompt up to the question, with what the tokenizer puts in front of it.
    question_ids: the rest of the prompt. references: what `scorer` (see scorers.py) compares the
    answer with. answer_tokens: how many tokens may be generated. metadata: what else a report may
    group by, such as `kind` or `depth`.

    Context, question and answer_tokens add up to the length asked for. Where several samples share
    a context (the same object), that holds for the longest of them.
    """

    context_ids: tuple[int, ...]
    question_ids: tuple[int, ...]
    references: tuple[str, ...]
    answer_tokens: int
    scorer: str
    metadata: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Positions the sample takes, generated tokens included."""
        return len(self.context_ids) + len(self.question_ids) + self.answer_tokens


@dataclass(frozen=True, slots=True)
class Sources:
    """Files of the user that some tasks read.

    essay: any long text, UTF-8, for essay-like haystacks; without one the documentation in Python's
    standard library is used. squad: SQuAD v2 JSON. hotpotqa: HotpotQA (distractor) JSON.
    infinitebench: directory with InfiniteBench's JSONL files.
    """

    essay: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
    infinitebench: Path | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """Which haystack to make; equal specs give equal samples, on any machine.

    length: positions of the longest sample, generated tokens included. index: which of the task's
    haystacks of this length. `rng` differs for every task, length, seed and index.
    """

    length: int
    index: int
    seed: int
    encoder: Encoder
    sources: Sources = Sources()

    def rng(self, task: str) -> random.Random:
        """The source of everything random in a haystack of `task`."""
        return random.Random(f"{task}/{self.length}/{self.seed}/{self.index}")


class Task(ABC):
    """Makes samples. `per_round`: haystacks of one round, for tasks that sweep something."""

    suite: ClassVar[str]
    per_round: ClassVar[int] = 1

    def __init__(self, name: str, summary: str) -> None:
        self.name = name
        self.summary = summary

    def check(self, sources: Sources) -> None:  # noqa: B027 - most tasks read no file
        """Raises InvalidRequest when a file the task reads is missing or wrong, naming the flag."""

    @abstractmethod
    def samples(self, spec: Spec) -> list[Sample]:
        """The samples of one haystack; they share their context.

        Raises InvalidRequest when the length is too short, or a file is missing, naming the flag.
        """


TASKS: Registry[Task] = Registry("task")


def register(task: Task) -> None:
    """Adds a task to the registry under its name."""
    TASKS.register(task.name)(task)


def select_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name; the name of a suite stands for all its tasks.

    Raises InvalidRequest for an unknown name, listing the valid ones.
    """
    every = [TASKS[name] for name in TASKS]
    suites = {task.suite for task in every}
    chosen: dict[str, Task] = {}
    for name in names:
        if name not in TASKS and name not in suites:
            raise InvalidRequest(
                f"unknown task {name!r}; suites: {', '.join(sorted(suites))}; "
                f"tasks: {', '.join(TASKS)}",
                reason="UNKNOWN_NAME",
            )
        found = [TASKS[name]] if name in TASKS else [t for t in every if t.suite == name]
        chosen.update((task.name, task) for task in found)
    return list(chosen.values())
