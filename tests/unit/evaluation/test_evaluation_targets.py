"""Which claims a report makes, and which it refuses to make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.report import Report, Target
from evaluation.defaults import DEFAULT, DEFAULT_METHOD, QUICK
from evaluation.diffuse import DEFAULT_DECODE, DIFFUSE, add_diffuse_targets
from evaluation.methods import parse_methods
from evaluation.results import Record
from evaluation.roles import Role, role_of
from evaluation.targets import add_targets, add_time_target
from evaluation.tasks import select_tasks
from longreach.types import WorkFigures

STREAMING = "local/streaming_llm:sink=128,window=512"


def records(
    method: str, scores: list[float], length: int = 32_768, attended: int = 10, **other: Any
) -> list[Record]:
    work = None
    if method != "full":
        work = WorkFigures(keys_in_scope=1000, keys_attended=attended, bytes_in_scope=1)
    fields: dict[str, Any] = {
        "task": "mixed", "suite": "mixed_haystack", "questions": 1, "answer": "",
        "references": ("1",), "context_tokens": 4000, "generated_tokens": 4, "seconds": 0.5,
        "metadata": {"kind": "kv"},
    }  # fmt: skip
    return [
        Record(
            method=method, score=score, haystack=i // 50, question=i % 50, length=length,
            work=work, **{**fields, **other},
        )
        for i, score in enumerate(scores)
    ]  # fmt: skip


def made(*groups: list[Record]) -> Report:
    report = Report("evaluation", {})
    add_targets(report, [record for group in groups for record in group])
    return report


def named(report: Report, part: str) -> Target:
    (found,) = [target for target in report.targets if part in target.name]
    return found


@pytest.mark.parametrize(("worse", "better", "met"), [(1, 0, True), (3, 2, True), (2, 0, False)])
def test_the_default_may_lose_one_net_answer_in_200(worse: int, better: int, met: bool) -> None:
    full = [0.0] * better + [1.0] * (200 - better)
    own = [1.0] * better + [0.0] * worse + [1.0] * (200 - better - worse)
    report = made(records("full", full), records(DEFAULT_METHOD, own))
    target = named(report, "answers lost of 200")
    assert target.measured == worse - better
    assert target.met is met
    assert "32K" in target.name
    assert f"n 200, {worse} worse and {better} better" in target.note


@pytest.mark.parametrize(("attended", "met"), [(30, True), (31, False)])
def test_the_default_may_attend_three_percent_of_the_keys(attended: int, met: bool) -> None:
    ones = [1.0] * 200
    report = made(records("full", ones), records(DEFAULT_METHOD, ones, attended=attended))
    target = named(report, "keys attended exactly")
    assert target.measured == attended / 1000
    assert target.met is met


def test_each_length_from_32k_on_has_its_own_claim_and_shorter_ones_none() -> None:
    ones = [1.0] * 200
    lengths = (16_384, 32_768, 131_072)
    groups = [records(m, ones, n) for m in ("full", DEFAULT_METHOD) for n in lengths]
    names = [target.name for target in made(*groups).targets if "answers lost" in target.name]
    assert [name.split(": ")[0].rsplit(", ", 1)[1] for name in names] == ["32K", "128K"]


def test_fewer_than_200_pairs_decide_nothing() -> None:
    ones = [1.0] * 199
    report = made(records("full", ones), records(DEFAULT_METHOD, ones))
    assert not [target for target in report.targets if "answers lost" in target.name]
    assert "199 paired questions; 200 are needed" in report.skipped[0].why


@pytest.mark.parametrize(("right", "met"), [(50, True), (51, False)])
def test_a_fixed_window_is_expected_to_lose_half_where_single_keys_decide(
    right: int, met: bool
) -> None:
    own = [1.0] * right + [0.0] * (100 - right)
    other = records("full", [1.0] * 50, task="vt", metadata={"kind": "vt"})
    also = records(STREAMING, [1.0] * 50, task="vt", metadata={"kind": "vt"})
    report = made(records("full", [1.0] * 100), records(STREAMING, own), other, also)
    (target,) = report.targets
    assert target.measured == right / 100, "chains of variables do not count"
    assert target.met is met


@pytest.mark.parametrize(("worse", "met"), [(1, True), (2, False)])
def test_another_index_may_lose_what_was_published(worse: int, met: bool) -> None:
    own = [0.0] * worse + [1.0] * (40 - worse)
    ruler = {"task": "niah_single_1", "suite": "ruler"}
    report = made(
        records("full", [1.0] * 40, **ruler), records("local/roargraph:top_k=100", own, **ruler)
    )
    (target,) = report.targets
    assert target.target == "<= 4"
    assert target.measured == 2.5 * worse
    assert target.met is met
    assert "RetrievalAttention's published loss" in target.note


def test_nothing_is_claimed_from_few_questions_or_a_useless_yardstick() -> None:
    few = made(records("full", [1.0] * 10), records("cluster:exact", [1.0] * 10))
    assert not few.targets
    assert "too few" in few.skipped[0].why
    useless = made(records("full", [0.0] * 40), records("cluster:exact", [0.0] * 40))
    assert not useless.targets
    assert "scores 0" in useless.skipped[0].why
    alone = made(records("cluster:exact", [1.0] * 40))
    assert not alone.targets
    assert "none of the same questions" in alone.skipped[0].why


def test_other_published_methods_are_measured_but_not_held_to_anything() -> None:
    ones = [1.0] * 40
    report = made(records("full", ones), records("local/quest:budget=2048", [0.0] * 40))
    assert (report.targets, report.skipped) == ([], [])


def test_the_report_may_take_three_hours() -> None:
    report = Report("evaluation", {})
    add_time_target(report, 10_800.0)
    add_time_target(report, 10_801.0)
    assert [target.met for target in report.targets] == [True, False]


def test_the_default_has_a_quarter_of_every_baselines_error_on_a_diffuse_head() -> None:
    report = Report("evaluation", {})
    errors = {DEFAULT_DECODE: 0.05, "flat:top_k=100": 0.2, "quest:budget=9": 0.19}
    add_diffuse_targets(report, errors, 4096)
    assert [(target.measured, target.met) for target in report.targets] == [
        (0.25, True),
        (0.2632, False),
    ]


@pytest.mark.parametrize(
    ("method", "role"),
    [
        ("full", Role.FULL),
        (DEFAULT_METHOD, Role.DEFAULT),
        ("cluster:exact", Role.SEARCHES),
        ("local/sketch:top_k=7", Role.SEARCHES),
        ("local/full@adaptive", Role.SEARCHES),
        ("local/full@vertical_slash", Role.BASELINE),
        ("cluster/hnsw:top_k=100", Role.BASELINE),
        ("local/snapkv:capacity=1024", Role.DROPS_KEYS),
        ("local/snapkv:capacity=1024,prompt=whole", Role.BASELINE),
    ],
)
def test_a_methods_role_follows_from_its_name(method: str, role: Role) -> None:
    assert role_of(method) is role


@pytest.mark.parametrize("selection", [DEFAULT, QUICK])
def test_what_is_run_by_default_exists_and_has_a_yardstick(selection: Any) -> None:
    assert selection.methods[0] == "full"
    assert [method.name for method in parse_methods(selection.methods)] == list(selection.methods)
    assert select_tasks([task for task in selection.tasks if task != DIFFUSE])
    assert DEFAULT_METHOD in selection.methods


def test_records_of_one_claim_are_told_from_those_of_others() -> None:
    ones = [1.0] * 200
    wrong_seed = [replace(r, haystack=r.haystack + 100) for r in records(DEFAULT_METHOD, ones)]
    report = made(records("full", ones), wrong_seed)
    assert not [target for target in report.targets if "answers lost" in target.name]
