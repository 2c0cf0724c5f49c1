"""Runs with scripted answerers: order, resuming, records."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation.answering import Answer, Answerer, AnyAnswerer
from evaluation.encoding import Encoder
from evaluation.methods import Method, parse_methods
from evaluation.results import ResultsFile
from evaluation.runner import Plan, run
from evaluation.tasks import Sources, select_tasks
from longreach.errors import InvalidRequest, Unavailable
from longreach.types import WorkFigures

WORK = WorkFigures(keys_in_scope=100, keys_scanned=10, keys_attended=5, bytes_in_scope=100)


class Script(Answerer[tuple[int, ...]]):
    """Answers with what the context says after the words of the question; counts its work."""

    def __init__(self, encoder: Encoder, fail_after: int = 10**9) -> None:
        self.encoder = encoder
        self.prefills = 0
        self.asked = 0
        self.held = 0
        self.fail_after = fail_after

    def prefill(
        self, context_ids: Sequence[int], room_tokens: int, on_progress: object
    ) -> tuple[int, ...]:
        self.prefills += 1
        self.held += 1
        self.room = room_tokens
        return tuple(context_ids)

    def answer(
        self, handle: tuple[int, ...], question_ids: Sequence[int], max_tokens: int
    ) -> Answer:
        if self.asked == self.fail_after:
            raise Unavailable("the script ends here")
        assert len(question_ids) + max_tokens <= self.room
        self.asked += 1
        stem = self.encoder.decode(question_ids).rsplit("? ", 1)[-1]
        after = self.encoder.decode(handle).partition(stem)[2]
        return Answer(tuple(self.encoder.encode(after)[:max_tokens]), 0.5, WORK, 0.25, ("flat",))

    def release(self, handle: tuple[int, ...]) -> None:
        self.held -= 1


class Progress:
    def __init__(self) -> None:
        self.count = 0
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def answered(self, haystacks: int) -> None:
        self.count += haystacks


class Bench:
    """A plan, and answerers that are remembered per method."""

    def __init__(self, encoder: Encoder, sources: Sources, path: Path) -> None:
        self.encoder = encoder
        self.sources = sources
        self.path = path
        self.scripts: dict[str, Script] = {}
        self.opened: list[list[str]] = []
        self.progress = Progress()

    def plan(
        self, tasks: Sequence[str], methods: str = "full,cluster:exact,cluster:top_k=5", n: int = 1
    ) -> Plan:
        chosen = tuple(select_tasks(tasks))
        return Plan(chosen, (4096,), tuple(parse_methods([methods])), n, sources=self.sources)

    def run(
        self,
        plan: Plan,
        configuration: Mapping[str, object] | None = None,
        limit_s: float | None = None,
    ) -> ResultsFile:
        self.progress = Progress()
        with ResultsFile(self.path, configuration or {"model": "scripted"}) as store:
            self.complete = run(plan, self.encoder, self.open, store, self.progress, limit_s)
        return store

    @contextmanager
    def open(self, group: Sequence[Method]) -> Iterator[Mapping[Method, AnyAnswerer]]:
        self.opened.append([method.name for method in group])
        for method in group:
            self.scripts.setdefault(method.name, Script(self.encoder))
        yield {method: self.scripts[method.name] for method in group}


@pytest.fixture
def bench(byte_encoder: Encoder, sources: Sources, tmp_path: Path) -> Bench:
    return Bench(byte_encoder, sources, tmp_path / "out" / "run.jsonl")


def test_every_method_answers_every_sample_and_is_scored(bench: Bench) -> None:
    plan = bench.plan(["needle", "passkey"])
    store = bench.run(plan)
    assert bench.complete
    assert len(store.records) == 3 * 11
    assert all(record.score == 1.0 for record in store.records)
    assert bench.opened == [["full"], ["cluster:exact", "cluster:top_k=5"]]
    assert all(script.held == 0 for script in bench.scripts.values())
    assert bench.progress.count == plan.size(plan.methods) == 33


def test_limits_leave_tasks_and_methods_out_beyond_a_length(bench: Bench) -> None:
    whole = dataclasses.replace(bench.plan(["needle", "passkey"]), lengths=(2048, 4096))
    plan = dataclasses.replace(whole, limits={"needle": 2048, "cluster:exact": 2048})
    store = bench.run(plan)
    asked = {(r.task, r.length, r.method) for r in store.records}
    methods = ("full", "cluster:exact", "cluster:top_k=5")
    assert asked == {
        *(("needle", 2048, method) for method in methods),
        *(("passkey", 2048, method) for method in methods),
        *(("passkey", 4096, method) for method in ("full", "cluster:top_k=5")),
    }
    assert bench.progress.count == plan.size(plan.methods) == 3 * 11 + 2
    bench.run(whole)
    assert bench.progress.count == whole.size(whole.methods) == 2 * 33
    asked_before = {name: script.asked for name, script in bench.scripts.items()}
    bench.run(whole)
    assert {name: script.asked for name, script in bench.scripts.items()} == asked_before


def test_a_mixed_haystack_is_prefilled_once_for_all_its_questions(
    bench: Bench, byte_encoder: Encoder
) -> None:
    plan = Plan(tuple(select_tasks(["mixed_noise"])), (12_288,), tuple(parse_methods(["full"])), 1)
    store = bench.run(plan)
    assert len(store.records) == store.records[0].questions >= 40
    assert bench.scripts["full"].prefills == 1
    by_kind = {record.metadata["kind"]: record.score for record in store.records}
    assert by_kind["passkey"] == 1.0
    assert {record.column for record in store.records} >= {"mixed_noise/kv", "mixed_noise/vt"}


def test_what_is_in_the_file_is_not_asked_again(bench: Bench) -> None:
    bench.run(bench.plan(["needle"], "full"))
    store = bench.run(bench.plan(["needle", "passkey"], "full", n=2))
    assert bench.scripts["full"].asked == 10 + 10 + 2
    assert len(store.records) == 22
    assert bench.progress.count == 22
    bench.opened.clear()
    bench.run(bench.plan(["needle", "passkey"], "full", n=2))
    assert bench.opened == []


def test_a_run_that_broke_off_goes_on_with_the_next_question(bench: Bench) -> None:
    plan = Plan(tuple(select_tasks(["mixed_noise"])), (12_288,), tuple(parse_methods(["full"])), 1)
    bench.scripts["full"] = Script(bench.encoder, fail_after=20)
    with pytest.raises(Unavailable):
        bench.run(plan)
    assert bench.scripts["full"].held == 0
    with bench.path.open("a") as file:
        file.write('{"method": "full", "task": "mixed')  # what a killed process may leave
    bench.scripts["full"] = Script(bench.encoder)
    store = bench.run(plan)
    questions = store.records[0].questions
    assert bench.scripts["full"].asked == questions - 20
    assert len({record.key for record in store.records}) == questions
    lines = [json.loads(line) for line in bench.path.read_text().splitlines()]
    assert sum("answer" in line for line in lines) == questions


def test_the_time_of_all_runs_adds_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(10 * call) for call in range(100))
    monkeypatch.setattr("evaluation.results.time.monotonic", lambda: next(clock))
    path = bench.path.parent / "clock.jsonl"
    with ResultsFile(path, {}) as store:
        store.tick()
    assert store.elapsed_s == 20.0
    with ResultsFile(path, {}) as again:
        assert again.elapsed_s == 20.0
    assert again.elapsed_s == 30.0


def test_answers_survive_the_file_unchanged(bench: Bench) -> None:
    before = bench.run(bench.plan(["passkey", "vt"]))
    again = ResultsFile(bench.path, {"model": "scripted"})
    with again:
        assert again.records == before.records
    (record,) = [r for r in again.records if r.method == "cluster:top_k=5" and r.task == "passkey"]
    assert record.work == WORK
    assert record.index_kinds == ("flat",)


def test_answers_of_another_configuration_are_not_mixed_in(bench: Bench) -> None:
    bench.run(bench.plan(["passkey"]))
    before = bench.path.read_text()
    with pytest.raises(InvalidRequest, match=r"another configuration \(different: model, seed\)"):
        bench.run(bench.plan(["passkey"]), {"model": "other", "seed": 1})
    assert bench.path.read_text() == before


def test_a_broken_line_is_named(bench: Bench) -> None:
    bench.run(bench.plan(["passkey"], "full"))
    lines = bench.path.read_text().splitlines(keepends=True)
    bench.path.write_text(lines[0] + "{nonsense\n" + lines[1])
    with pytest.raises(InvalidRequest, match="line 2 is not JSON"):
        bench.run(bench.plan(["passkey"], "full"))


def test_a_spent_time_limit_leaves_the_rest_unasked_and_says_so(bench: Bench) -> None:
    store = bench.run(bench.plan(["passkey"]), limit_s=-1)
    assert not bench.complete
    assert store.records == ()


def test_a_short_time_limit_gives_every_method_its_share_of_a_haystack(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(10_000))
    clock = SimpleNamespace(monotonic=lambda: float(next(seconds)))
    # Its module's name for the clock, not the clock of the process: other threads read that too.
    monkeypatch.setattr("evaluation.runner.time", clock)
    plan = bench.plan(["mixed"], "cluster:exact,cluster:top_k=5")
    store = bench.run(plan, limit_s=24)
    assert not bench.complete
    asked = [script.asked for script in bench.scripts.values()]
    assert len(asked) == 2
    assert all(8 <= count <= 12 for count in asked)
    kinds = {record.metadata["kind"] for record in store.records if record.question < 8}
    assert len(kinds) == 8, "some questions of every kind"
    again = bench.run(plan)
    assert bench.complete
    assert len(again.records) == 2 * store.records[0].questions


def test_methods_are_told_apart_and_checked() -> None:
    methods = parse_methods(["full,cluster:mass=0.98[64,4096],cluster/hnsw:top_k=100+tail", "full"])
    assert [m.name for m in methods] == [
        *("full", "cluster:mass=0.98[64,4096]", "cluster/hnsw:top_k=100+tail"),
    ]
    assert (methods[2].index, methods[2].budget) == ("hnsw", "top_k=100+tail")
    for wrong, message in (
        ("sparse", "unknown method 'sparse'"),
        ("cluster:top=1", "is not a budget"),
        ("cluster/trie:exact", "'trie'.*flat"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            parse_methods([wrong])
