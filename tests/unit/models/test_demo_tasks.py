from __future__ import annotations

import itertools
import random

import pytest

from models.sequences import TrainingText
from models.tasks import TRAINING_TASKS, Sampler, needle, passkey, variable_ruler
from models.words import coined_word, is_held_out, random_uuid, variable_name, word_list


def sampler(text: TrainingText, seed: int = 0, held_out: bool = False) -> Sampler:
    return Sampler(random.Random(seed), text.words, held_out=held_out)


@pytest.mark.parametrize("name", TRAINING_TASKS)
def test_the_answer_stands_in_the_facts_own_sentences(name: str, text: TrainingText) -> None:
    maker, _ = TRAINING_TASKS[name]
    drawn = sampler(text)
    facts = [fact for fact in (maker(drawn) for _ in range(100)) if fact is not None]
    assert len(facts) > 30
    for fact in facts:
        for question in fact.questions:
            for word in question.answer.split():
                assert word in "".join(fact.sentences)


@pytest.mark.parametrize("name", TRAINING_TASKS)
def test_encoding_in_parts_equals_encoding_the_whole(name: str, text: TrainingText) -> None:
    """The supervised tokens are exactly the answer only if the cut does not change tokens."""
    maker, _ = TRAINING_TASKS[name]
    drawn = sampler(text, 1)
    for fact in (maker(drawn) for _ in range(60)):
        if fact is None:
            continue
        for q in fact.questions:
            whole = text.encode(q.prompt + q.answer + q.terminator)
            assert text.encode(q.prompt) + text.encode(q.answer + q.terminator) == whole


def test_the_same_seed_draws_the_same_facts(text: TrainingText) -> None:
    for maker, _ in TRAINING_TASKS.values():
        first, second = sampler(text, 7), sampler(text, 7)
        assert [maker(first) for _ in range(20)] == [maker(second) for _ in range(20)]


def test_a_key_is_never_given_twice(text: TrainingText) -> None:
    drawn = sampler(text)
    assert passkey(drawn) is not None
    assert passkey(drawn) is None


def test_numbers_have_exactly_the_digits_asked_for(text: TrainingText) -> None:
    plain = sampler(text)
    pooled = Sampler(random.Random(0), text.words, digit_groups=("123", "456"))
    for digits in range(4, 9):
        assert len(plain.number(digits)) == digits
        assert set(pooled.number(digits)) <= set("123456")
        assert len(pooled.number(digits)) == digits


def test_the_needle_is_worded_as_in_ruler(text: TrainingText) -> None:
    fact = needle(sampler(text), "calm-lake", "1234567", "numbers")
    assert fact.sentences == (" One of the special magic numbers for calm-lake is: 1234567.",)
    tail = " The special magic number for calm-lake mentioned in the provided text is"
    assert fact.questions[0].prompt.endswith(tail)


def test_a_chain_of_four_hops_assigns_from_name_to_name(text: TrainingText) -> None:
    fact = variable_ruler(sampler(text), hops=4)
    assert fact is not None
    names = fact.questions[0].answer.split()
    assert len(names) == 5
    assert fact.sentences[1:] == tuple(
        f" VAR {name} = VAR {source}" for source, name in itertools.pairwise(names)
    )


@pytest.mark.parametrize("kind", ["adjectives", "nouns"])
def test_training_and_held_out_words_are_disjoint(kind: str) -> None:
    train, held_out = set(word_list(kind, False)), set(word_list(kind, True))
    assert not train & held_out
    assert 0.15 < len(held_out) / len(train | held_out) < 0.35
    assert all(is_held_out(word) for word in held_out)


def test_random_names_have_their_shapes() -> None:
    rng = random.Random(0)
    assert [len(part) for part in random_uuid(rng).split("-")] == [8, 4, 4, 4, 12]
    assert variable_name(rng).isupper()
    assert coined_word(rng).isalpha()
