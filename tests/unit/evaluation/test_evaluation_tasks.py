"""What a question asks for can be found in its context by reading it, without a model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.encoding import Encoder
from evaluation.tasks import TASKS, Sample, Sources, Spec
from evaluation.tasks.haystack import NOISE, load_essay, place
from longreach.errors import InvalidRequest

LENGTH = 16_384


class Read:
    """A sample as text."""

    def __init__(self, sample: Sample, encoder: Encoder) -> None:
        self.context = encoder.decode(sample.context_ids)
        self.question = encoder.decode(sample.question_ids)
        self.sample = sample
        self.references = sample.references


Reader = Callable[..., Read]
"""Reads a task's first sample: (task, index, length)."""


@pytest.fixture
def read(byte_encoder: Encoder, sources: Sources) -> Reader:
    def one(task: str, index: int = 0, length: int = LENGTH) -> Read:
        samples = TASKS[task].samples(Spec(length, index, 0, byte_encoder, sources))
        return Read(samples[0], byte_encoder)

    return one


NIAH = [name for name in TASKS if name.startswith("niah")]
PATTERN = r"One of the special magic (\w+) for ([\w-]+) is: ([\w-]+)\."


@pytest.mark.parametrize("task", NIAH)
@pytest.mark.parametrize("index", range(3))
def test_the_needles_of_the_asked_keys_hold_exactly_the_references(
    read: Reader, task: str, index: int
) -> None:
    sample = read(task, index)
    needles = re.findall(PATTERN, sample.context)
    asked = re.search(r"for (.*?) mentioned in the provided text\?", sample.question)
    assert asked is not None
    keys = set(re.split(r", and |, ", asked.group(1)))
    assert sorted(v for _, key, v in needles if key in keys) == sorted(sample.references)
    assert len(keys) * len(sample.references) in (1, 4, 16)


@pytest.mark.parametrize(
    ("task", "keys", "values"),
    [
        ("niah_single_1", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 1, 4),
        ("niah_multiquery", 4, 1),
    ],
)
def test_needle_counts_are_those_of_ruler(read: Reader, task: str, keys: int, values: int) -> None:
    found = Counter(key for _, key, _ in re.findall(PATTERN, read(task).context))
    assert sorted(found.values()) == [values] * keys


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_a_haystack_of_needles_is_nothing_else_and_repeats_no_key(read: Reader, task: str) -> None:
    context = read(task).context
    needles = re.findall(PATTERN, context)
    assert len({key for _, key, _ in needles}) == len(needles) > 100
    assert len(re.sub(PATTERN, "", context)) < 500


@pytest.mark.parametrize(
    "task", ["niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1"]
)
def test_needles_stand_at_the_depths_they_were_given(read: Reader, task: str) -> None:
    for index in range(5):
        sample = read(task, index)
        body = sample.context.split("afterwards.\n", 1)[1]
        found = sorted(match.start() / len(body) for match in re.finditer(PATTERN, body))
        wanted = sorted(sample.sample.metadata["depths"])
        assert found == pytest.approx(wanted, abs=0.025)


def test_a_round_of_the_needle_test_visits_ten_depths(read: Reader) -> None:
    for index in range(12):
        sample = read("needle", index)
        body = sample.context.split("about it.\n", 1)[1]
        number = re.search(r"The special magic (\w+) number is: (\d{7})\.", body)
        assert number is not None
        assert number.group(2) == sample.references[0]
        assert f"special magic {number.group(1)} number?" in sample.question
        assert number.start() / len(body) == pytest.approx(index % 10 / 9, abs=0.02)


@pytest.mark.parametrize("task", ["passkey", "number_string"])
def test_keys_in_noise_stand_at_the_59_depths_of_infinitebench(read: Reader, task: str) -> None:
    depths = set()
    for index in range(59):
        sample = read(task, index, 3000)
        depths.add(round(sample.sample.metadata["depth"], 6))
        if index < 6:
            body = sample.context.split("there.\n\n", 1)[1]
            line = re.search(
                r"The (?:pass key|sequence of digits) is (\d+)\. Remember it\. (\d+)", body
            )
            assert line is not None
            assert line.group(1) == line.group(2) == sample.references[0]
            assert line.start() / len(body) == pytest.approx(
                sample.sample.metadata["depth"], abs=0.06
            )
    assert depths == {round(step / 58, 6) for step in range(59)}


def test_the_chain_of_variables_leads_from_the_value_to_every_reference(read: Reader) -> None:
    sample = read("vt")
    value = re.search(r"assigned the value (\d{5}) in", sample.question)
    assert value is not None
    held: dict[str, str] = {}
    for name, source in re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d{5})", sample.context):
        held[name] = held.get(source, source)
    found = [name for name, number in held.items() if number == value.group(1)]
    assert found == list(sample.references)
    assert len(found) == 5
    assert "they are: " in sample.context, "the solved example comes first"


def test_common_words_are_the_ten_most_frequent_of_the_last_list(read: Reader) -> None:
    context = read("cwe").context.rsplit("appear most often.\n", 1)[1]
    counts = Counter(re.findall(r"\d+\. (\S+)", context))
    assert {word for word, _ in counts.most_common(10)} == set(read("cwe").references)
    assert sorted(set(counts.values())) == [3, 30]


def test_frequent_words_are_the_three_most_frequent_after_the_dots(read: Reader) -> None:
    for length in (1024, LENGTH):
        sample = read("fwe", 0, length)
        words = sample.context.split("coded words. ", 1)[1].split()
        counts = Counter(word for word in words if set(word) != {"."})
        (_, first), (_, second), (_, third), (_, fourth) = counts.most_common(4)
        assert tuple(word for word, _ in counts.most_common(3)) == sample.references
        assert first > second > third > fourth


def test_the_value_of_the_asked_key_is_in_the_json_object(read: Reader) -> None:
    for index in range(3):
        sample = read("kv_retrieval", index)
        pairs = json.loads(sample.context.split("JSON data:\n", 1)[1])
        key = re.search(r'Key: "(.*?)"', sample.question)
        assert key is not None
        assert pairs[key.group(1)] == sample.references[0]
        place_of = list(pairs).index(key.group(1)) / len(pairs)
        assert place_of == pytest.approx(sample.sample.metadata["depth"], abs=0.02)


def test_the_code_returns_the_reference_when_it_is_run(read: Reader) -> None:
    for index in range(5):
        sample = read("code_run", index)
        code = sample.context.split("Python code.\n\n", 1)[1]
        names: dict[str, object] = {}
        exec(code[code.index("def ") :], names)
        call = re.search(r"The value of (func_\d+\(\d\)) is", sample.question)
        assert call is not None
        assert str(eval(call.group(1), names)) == sample.references[0]


def test_the_statistic_of_the_list_is_the_reference(read: Reader) -> None:
    expected = {
        "largest": lambda n: max(n),
        "second largest": lambda n: sorted(set(n), reverse=True)[1],
        "third largest": lambda n: sorted(set(n), reverse=True)[2],
        "smallest": lambda n: min(n),
        "second smallest": lambda n: sorted(set(n))[1],
        "third smallest": lambda n: sorted(set(n))[2],
        "median": lambda n: sorted(n)[(len(n) - 1) // 2],
    }
    for index, (kind, statistic) in enumerate(expected.items()):
        sample = read("math_find", index, 4096)
        numbers = [int(n) for n in re.findall(r"\d+", sample.context)]
        assert f"The {kind} number of the list" in sample.question
        assert str(statistic(numbers)) == sample.references[0]


def test_the_running_values_are_those_of_the_sum(read: Reader) -> None:
    sample = read("math_calc", 0, 4096)
    expression = sample.context.rsplit("Expression: ", 1)[1]
    terms = re.findall(r"(?:^|[+-] )\d+", expression)
    total, values = 0, []
    for term in terms:
        total += int(term.replace(" ", ""))
        values.append(str(total))
    assert tuple(values) == sample.references
    assert min(map(int, values)) >= 0
    assert sample.sample.answer_tokens >= len(f" [{', '.join(values)}]")


HIDDEN = ("number", "word", "uuid", "passkey", "city", "vt")


def test_a_mixed_haystack_holds_the_answer_to_each_of_its_questions(
    byte_encoder: Encoder, sources: Sources
) -> None:
    for task in ("mixed", "mixed_noise", "mixed_essay"):
        samples = TASKS[task].samples(Spec(LENGTH, 0, 0, byte_encoder, sources))
        context = byte_encoder.decode(samples[0].context_ids)
        kinds = Counter(sample.metadata["kind"] for sample in samples)
        assert set(kinds) == {*HIDDEN, "kv", "kv_uuid"}
        assert len(set(kinds.values())) == 1, "as many questions of each kind"
        for sample in samples:
            assert all(reference in context for reference in sample.references)
        assert len({sample.question_ids for sample in samples}) == len(samples)


def test_an_essay_haystack_is_running_text_of_the_users_file(
    read: Reader, sources: Sources
) -> None:
    essay = load_essay(sources.essay)
    assert essay.name.startswith("essay.txt (")
    body = re.sub(PATTERN + " ", "", read("niah_single_2").context.split("afterwards.\n", 1)[1])
    twice = " ".join(essay.sentences) + " " + " ".join(essay.sentences)
    assert body.strip() in re.sub(r"\s+", " ", twice)


def test_without_a_file_the_essay_is_the_standard_librarys_documentation() -> None:
    essay = load_essay(None)
    assert "CPython" in essay.name
    assert len(essay.sentences) > 5000
    assert max(len(sentence.split()) for sentence in essay.sentences) <= 40


def test_an_unreadable_or_short_essay_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot read"):
        load_essay(tmp_path / "missing.txt")
    short = tmp_path / "short.txt"
    short.write_text("One. Two. Three.")
    with pytest.raises(InvalidRequest, match="has 3 sentences; an essay haystack needs 100"):
        load_essay(short)


def test_needles_keep_their_order_at_one_place() -> None:
    assert place([NOISE] * 2, [(1.0, "c"), (0.0, "a"), (0.0, "b"), (0.5, "m")]) == [
        *("a", "b", NOISE, "m", NOISE, "c"),
    ]
