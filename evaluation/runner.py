"""Asks every method every sample, each context prefilled once per group of methods."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from evaluation.answering import Answer, AnyAnswerer
from evaluation.encoding import Encoder
from evaluation.methods import Method, group_methods
from evaluation.results import Key, Record, ResultsFile
from evaluation.scorers import score
from evaluation.tasks.base import Sample, Sources, Spec, Task


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked: `n` rounds of every task at every length, to every method.

    limits: names of tasks and methods that are not asked beyond a length (tokens).
    """

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    methods: tuple[Method, ...]
    n: int
    seed: int = 0
    sources: Sources = field(default_factory=Sources)
    limits: Mapping[str, int] = field(default_factory=dict)

    def haystacks(self) -> Iterator[tuple[Task, int, int]]:
        """Every (task, length, haystack), by rounds: a stopped run has some of each."""
        for index in range(self.n):
            for length in self.lengths:
                for task in self.tasks:
                    if self._within(task.name, length):
                        for step in range(task.per_round):
                            yield task, length, index * task.per_round + step

    def asked_of(self, methods: Sequence[Method], length: int) -> list[Method]:
        """Those of the methods that are asked at a length."""
        return [method for method in methods if self._within(method.name, length)]

    def size(self, methods: Sequence[Method]) -> int:
        """How many haystacks these methods together have to answer."""
        return sum(len(self.asked_of(methods, length)) for _, length, _ in self.haystacks())

    def _within(self, name: str, length: int) -> bool:
        return length <= self.limits.get(name, length)


class Watcher(Protocol):
    """Told how a run goes."""

    def stage(self, text: str) -> None:
        """What is being done now."""

    def answered(self, haystacks: int) -> None:
        """So many more haystacks are answered; all of them are Plan.size of every method."""


class Store(Protocol):
    """Where answers go, and which of them are there (evaluation.results)."""

    def has(self, key: Key) -> bool:
        """Whether this answer is there."""

    def has_haystack(self, method: str, task: str, length: int, haystack: int) -> bool:
        """Whether every answer of a method over a haystack is there."""

    def append(self, record: Record) -> None:
        """Keeps an answer."""


Open = Callable[[Sequence[Method]], AbstractContextManager[Mapping[Method, AnyAnswerer]]]
"""Gives the answerers of a group of methods, for as long as they are needed."""


def run(
    plan: Plan,
    encoder: Encoder,
    open_answerers: Open,
    store: ResultsFile,
    watcher: Watcher,
    limit_s: float | None = None,
) -> bool:
    """Asks what `store` has no answer for; False when the time limit left something unasked.

    Each group of methods may use its share of the limit and what earlier groups left over, and each
    method its share of a haystack's time; one question is always asked and finished.
    """
    started = time.monotonic()
    groups = group_methods(plan.methods)
    complete = True
    for count, group in enumerate(groups, 1):
        deadline = None if limit_s is None else started + limit_s * count / len(groups)
        todo = [
            (task, length, index, methods)
            for task, length, index in plan.haystacks()
            if (methods := unanswered(plan, store, group, task, length, index))
        ]
        watcher.answered(plan.size(group) - sum(len(methods) for *_, methods in todo))
        if not todo:
            continue
        watcher.stage(f"starting {group[0].name}")
        with open_answerers(group) as answerers:
            for task, length, index, methods in todo:
                if deadline is not None and time.monotonic() > deadline:
                    complete = False
                    break
                spec = Spec(length, index, plan.seed, encoder, plan.sources)
                asked = {method: answerers[method] for method in methods}
                complete &= ask_haystack(task, spec, asked, store, watcher, deadline)
                store.tick()
                watcher.answered(len(methods))
    return complete


def unanswered(
    plan: Plan, store: Store, group: Sequence[Method], task: Task, length: int, index: int
) -> list[Method]:
    """The methods of a group that a plan still has to ask over a haystack."""
    return [
        method
        for method in plan.asked_of(group, length)
        if not store.has_haystack(method.name, task.name, length, index)
    ]


def ask_haystack(
    task: Task,
    spec: Spec,
    answerers: Mapping[Method, AnyAnswerer],
    store: Store,
    watcher: Watcher,
    deadline: float | None = None,
) -> bool:
    """Asks the methods what `store` has no answer for over one haystack.

    False when the deadline (monotonic) left questions unasked.
    """
    return _Haystack(task, spec, watcher).ask_all(answerers, store, deadline)


class _Haystack:
    """One haystack on its way through the methods of a group."""

    def __init__(self, task: Task, spec: Spec, watcher: Watcher) -> None:
        self._task = task
        self._spec = spec
        self._watcher = watcher
        watcher.stage(f"{task.name} {spec.length} #{spec.index}: writing")
        self._samples = task.samples(spec)
        self._where = (task.name, spec.length, spec.index)

    def ask_all(
        self, answerers: Mapping[Method, AnyAnswerer], store: Store, deadline: float | None
    ) -> bool:
        """See ask_haystack."""
        started = time.monotonic()
        complete = True
        context = self._samples[0].context_ids
        room = max(len(s.question_ids) + s.answer_tokens for s in self._samples)
        handles: list[tuple[AnyAnswerer, object]] = []
        try:
            for count, (method, answerer) in enumerate(answerers.items(), 1):
                label = f"{method.name}: {self._task.name} {self._spec.length} #{self._spec.index}"
                handle = answerer.prefill(context, room, self._stage(label))
                handles.append((answerer, handle))
                until = None
                if deadline is not None:
                    until = started + (deadline - started) * count / len(answerers)
                complete &= self._ask(method, answerer, handle, store, label, until)
        finally:
            for answerer, handle in handles:
                answerer.release(handle)
        return complete

    def _stage(self, label: str) -> Callable[[str], None]:
        return lambda text: self._watcher.stage(f"{label}: {text}")

    def _ask(
        self,
        method: Method,
        answerer: AnyAnswerer,
        handle: object,
        store: Store,
        label: str,
        until: float | None,
    ) -> bool:
        for number, sample in enumerate(self._samples):
            if store.has((method.name, *self._where, number)):
                continue
            if until is not None and number and time.monotonic() > until:
                return False
            self._watcher.stage(f"{label}: question {number + 1} of {len(self._samples)}")
            answer = answerer.answer(handle, sample.question_ids, sample.answer_tokens)
            store.append(self._record(method, number, sample, answer))
        return True

    def _record(self, method: Method, number: int, sample: Sample, answer: Answer) -> Record:
        text = self._spec.encoder.decode(answer.ids)
        return Record(
            method=method.name,
            task=self._task.name,
            suite=self._task.suite,
            length=self._spec.length,
            haystack=self._spec.index,
            question=number,
            questions=len(self._samples),
            score=score(sample.scorer, text, sample.references),
            answer=text,
            references=sample.references,
            context_tokens=len(sample.context_ids),
            generated_tokens=len(answer.ids),
            seconds=round(answer.seconds, 4),
            metadata=sample.metadata,
            work=answer.work,
            resident_share=round(answer.resident_share, 6),
            index_kinds=answer.index_kinds,
            prefill_density=answer.prefill_density,
        )
