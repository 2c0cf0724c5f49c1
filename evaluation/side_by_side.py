"""Several processes answer side by side, each a few methods over one haystack at a time.

For methods that run in this process: a decode step of a small model keeps one CPU busy, whatever
the number of threads.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from typing import Any

from evaluation.encoding import load_encoder
from evaluation.methods import Deployment, Method, group_methods, open_answerers
from evaluation.results import Key, Record, ResultsFile
from evaluation.runner import Plan, Watcher, ask_haystack, unanswered
from evaluation.tasks import select_tasks
from evaluation.tasks.base import Spec
from longreach.errors import Internal

_LOOK_S = 1.0
_END_S = 10.0


@dataclass(frozen=True, slots=True)
class Unit:
    """What a process takes at a time: methods of one prefill over one haystack.

    answered: the answers that an earlier run left.
    """

    methods: tuple[Method, ...]
    task: str
    length: int
    index: int
    answered: frozenset[Key]


@dataclass(frozen=True, slots=True)
class _Stage:
    text: str


@dataclass(frozen=True, slots=True)
class _Ended:
    """A unit is done, or what made it fail."""

    methods: int
    error: Exception | None = None


def units_of(plan: Plan, store: ResultsFile, processes: int) -> list[Unit]:
    """What `store` has no answer for; the longest, which take longest, first.

    The methods of one prefill stay together, unless there are fewer haystacks of a length than
    processes.
    """
    units = []
    answered: defaultdict[tuple[str, str, int, int], set[Key]] = defaultdict(set)
    for record in store.records:
        answered[record.method, record.task, record.length, record.haystack].add(record.key)
    alike = Counter((task.name, length) for task, length, _ in plan.haystacks())
    for task, length, index in plan.haystacks():
        where = (task.name, length, index)
        parts = -(-processes // alike[task.name, length])
        for group in group_methods(plan.methods):
            unasked = unanswered(plan, store, group, task, length, index)
            for part in range(parts):
                methods = tuple(unasked[part::parts])
                if not methods:
                    continue
                there = (answered[method.name, *where] for method in methods)
                units.append(Unit(methods, *where, frozenset().union(*there)))
    return sorted(units, key=lambda unit: (-unit.length, -len(unit.methods)))


def run_side_by_side(
    plan: Plan, deployment: Deployment, store: ResultsFile, watcher: Watcher, processes: int
) -> None:
    """Asks what `store` has no answer for. Every method of the plan must run in its process.

    Raises what a process raised, and Internal when one dies.
    """
    units = units_of(plan, store, processes)
    watcher.answered(plan.size(plan.methods) - sum(len(unit.methods) for unit in units))
    context = multiprocessing.get_context("spawn")
    todo: Any = context.Queue()
    told: Any = context.Queue()
    for unit in units:
        todo.put(unit)
    processes = min(processes, len(units))
    for _ in range(processes):
        todo.put(None)
    threads = max(1, (os.cpu_count() or 1) // max(1, processes))
    with _environment("OMP_NUM_THREADS", str(threads)):
        workers = [
            context.Process(
                target=_answer, args=(deployment, plan, threads, todo, told), daemon=True
            )
            for _ in range(processes)
        ]
        for worker in workers:
            worker.start()
    try:
        _collect(len(units), workers, told, store, watcher)
    finally:
        _end(workers)


def _collect(
    units: int, workers: list[SpawnProcess], told: Any, store: ResultsFile, watcher: Watcher
) -> None:
    while units:
        try:
            news = told.get(timeout=_LOOK_S)
        except queue.Empty:
            dead = [worker for worker in workers if worker.exitcode]
            if dead:
                raise Internal(
                    f"a process of the evaluation died (exit status {dead[0].exitcode}; -9 often "
                    "means that memory ran out: give --jobs 1); its answers so far are kept"
                ) from None
            continue
        match news:
            case Record():
                store.append(news)
            case _Stage(text):
                watcher.stage(text)
            case _Ended(methods, error):
                if error is not None:
                    raise error
                units -= 1
                store.tick()
                watcher.answered(methods)


def _end(workers: list[SpawnProcess]) -> None:
    """They end by themselves when nothing is left to do; otherwise what they do is of no use."""
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(_END_S)
        if worker.is_alive():
            worker.kill()


def _answer(deployment: Deployment, plan: Plan, threads: int, todo: Any, told: Any) -> None:
    """A process's work: units until there are none."""
    import torch

    from retrieval_node import kernel

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends its processes.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    kernel.set_threads(threads)
    encoder = load_encoder(deployment.model)
    while (unit := todo.get()) is not None:
        teller = _Teller(unit, told)
        try:
            (task,) = select_tasks([unit.task])
            spec = Spec(unit.length, unit.index, plan.seed, encoder, plan.sources)
            with open_answerers(unit.methods, deployment) as answerers:
                ask_haystack(task, spec, answerers, teller, teller)
        except Exception as error:
            told.put(_Ended(0, error))
            return
        told.put(_Ended(len(unit.methods)))


def _end_with_parent() -> None:
    """A parent that was killed cannot end its processes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Teller:
    """Store and watcher of a unit in its process: tells the parent."""

    def __init__(self, unit: Unit, told: Any) -> None:
        self._unit = unit
        self._told = told

    def has(self, key: Key) -> bool:
        """Whether this answer was there before."""
        return key in self._unit.answered

    def has_haystack(self, method: str, task: str, length: int, haystack: int) -> bool:
        """Never: such methods are in no unit."""
        return False

    def append(self, record: Record) -> None:
        """Passes an answer on."""
        self._told.put(record)

    def stage(self, text: str) -> None:
        """Passes on what is being done."""
        self._told.put(_Stage(text))

    def answered(self, haystacks: int) -> None:
        """The end of the unit says it."""


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets a variable for the processes that start meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
