from __future__ import annotations

import pytest

from evaluation.encoding import Encoder
from evaluation.tasks import TASKS, Sample, Sources, Spec, select_tasks
from evaluation.tasks.draft import largest_fit
from longreach.errors import InvalidRequest

GENERATED = [name for name in TASKS if TASKS[name].suite in ("ruler", "infinitebench", "needle")]
MIXED = [name for name in TASKS if TASKS[name].suite == "mixed_haystack"]


def make(task: str, spec: Spec) -> list[Sample]:
    return TASKS[task].samples(spec)


def test_every_suite_of_the_papers_is_there() -> None:
    assert {t.name for t in select_tasks(["ruler"])} == {
        *(f"niah_single_{i}" for i in (1, 2, 3)),
        *(f"niah_multikey_{i}" for i in (1, 2, 3)),
        *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"),
    }
    assert {t.name for t in select_tasks(["infinitebench"])} == {
        *("passkey", "number_string", "kv_retrieval", "code_run", "math_find", "math_calc"),
    }


@pytest.mark.parametrize("task", GENERATED)
def test_context_question_and_answer_take_exactly_the_length(
    task: str, encoder: Encoder, sources: Sources
) -> None:
    for length in (8192, 10_001):
        (sample,) = make(task, Spec(length, 1, 0, encoder, sources))
        assert sample.tokens == length
        assert sample.context_ids[: len(encoder.start_ids)] == encoder.start_ids


@pytest.mark.parametrize("task", MIXED)
def test_a_shared_haystack_has_the_exact_length_for_its_longest_question(
    task: str, encoder: Encoder, sources: Sources
) -> None:
    samples = make(task, Spec(16_384, 0, 0, encoder, sources))
    assert len(samples) % 8 == 0
    assert len(samples) >= 8
    assert max(sample.tokens for sample in samples) == 16_384
    assert all(sample.context_ids is samples[0].context_ids for sample in samples)


def test_what_a_tokenizer_puts_in_front_is_kept_apart(encoder: Encoder) -> None:
    expected = {"demo": 1, "bytes": 0, "pieces": 1}
    assert len(encoder.start_ids) == expected[encoder.name]
    assert not set(encoder.start_ids) & set(encoder.encode("The grass is green."))


@pytest.mark.parametrize("task", [*GENERATED, *MIXED])
def test_equal_specs_give_equal_samples_and_others_differ(
    task: str, byte_encoder: Encoder, sources: Sources
) -> None:
    def spec(index: int, seed: int) -> Spec:
        return Spec(16_384, index, seed, byte_encoder, sources)

    assert make(task, spec(0, 0)) == make(task, spec(0, 0))
    others = [make(task, spec(1, 0)), make(task, spec(0, 1))]
    assert all(other[0].context_ids != make(task, spec(0, 0))[0].context_ids for other in others)


@pytest.mark.parametrize("task", GENERATED)
def test_too_short_a_length_is_refused_with_the_least_one(
    task: str, byte_encoder: Encoder, sources: Sources
) -> None:
    with pytest.raises(InvalidRequest, match=rf"task {task} needs at least \d+ tokens"):
        make(task, Spec(40, 0, 0, byte_encoder, sources))


@pytest.mark.parametrize("limit", [7, 8, 100, 101, 5000])
def test_the_largest_fit_is_the_one_a_linear_search_finds(limit: int) -> None:
    def uneven(units: int) -> int:
        return 7 + units * units // 3 + units % 2

    def even(units: int) -> int:
        return 3 * units + 5

    for count in (uneven, even):
        best = max((n for n in range(3000) if count(n) <= limit), default=0)
        found = largest_fit(count, limit, least=0)
        assert count(found) <= limit
        assert found in (best, best - 1)
        assert largest_fit(count, limit, least=0, most=4) == min(4, found)


def test_sizing_reads_a_haystack_only_a_few_times() -> None:
    asked: list[int] = []

    def count(units: int) -> int:
        asked.append(units)
        return 40 + 31 * units + units // 7

    largest_fit(count, 131_072, least=1)
    assert len(asked) <= 12
    assert max(asked) <= 131_072 // 31 * 1.1


def test_unknown_tasks_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"'niah'.*niah_single_1"):
        select_tasks(["niah"])
