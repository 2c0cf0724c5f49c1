"""RULER's eight needle-in-a-haystack tasks (section 3.1 of arXiv 2404.06654).

    single_1     noise,   word -> number         multikey_2  distractor needles, word -> number
    single_2     essay,   word -> number         multikey_3  distractor needles, uuid -> uuid
    single_3     essay,   word -> uuid           multivalue  essay, one key with four values
    multikey_1   essay,   four keys, one asked   multiquery  essay, four keys, all asked

Wording, key and value types, depths and generated tokens are RULER's. Keys are drawn from the
held-out part of its word lists and are distinct, so that no question has two answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from evaluation.tasks.base import Sample, Spec, Task, register
from evaluation.tasks.draft import Draft, Query, fit
from evaluation.tasks.haystack import NOISE, load_essay, place
from models.words import random_uuid, word_list

NEEDLE = "One of the special magic {type} for {key} is: {value}."
ANSWER_TOKENS = 128
DEPTHS = 40
"""RULER places needles of an essay haystack at 40 equally spaced depths."""

_MANY = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards.\n",
    "\nWhat are all the special magic {type} for {query} mentioned in the provided text?"
    " The special magic {type} for {query} mentioned in the provided text are",
)
_ONE = (
    "A special magic {type} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards.\n",
    "\nWhat is the special magic {type} for {query} mentioned in the provided text?"
    " The special magic {type} for {query} mentioned in the provided text is",
)


@dataclass(frozen=True)
class Needles:
    """The parameters of one task, with RULER's names: how many keys, values per key and queries."""

    haystack: str
    key_type: str = "words"
    value_type: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


class NiahTask(Task):
    """One of RULER's needle tasks."""

    suite: ClassVar[str] = "ruler"

    def __init__(self, name: str, summary: str, needles: Needles) -> None:
        super().__init__(name, summary)
        self.needles = needles

    def samples(self, spec: Spec) -> list[Sample]:
        """One sample."""
        rng, shape = spec.rng(self.name), self.needles
        facts = distinct_facts(rng, shape.key_type, shape.value_type, shape.values)
        hidden = list(islice(facts, shape.keys))
        sentences = [needle(shape.value_type, key, v) for key, values in hidden for v in values]
        rng.shuffle(sentences)
        depths = self._depths(rng, len(sentences))
        asked = rng.sample(hidden, shape.queries)
        preamble, query = question(
            shape.value_type,
            [key for key, _ in asked],
            tuple(value for _, values in asked for value in values),
        )
        units, separator, filler = self._haystack(spec, rng, facts)

        def write(count: int) -> Draft:
            body = separator.join(place(units(count), list(zip(depths, sentences, strict=True))))
            return Draft(preamble, body, (query,), filler, {"depths": depths})

        return fit(self.name, spec, write)

    def _depths(self, rng: random.Random, count: int) -> list[float]:
        if self.needles.haystack == "essay":
            return [depth / (DEPTHS - 1) for depth in rng.sample(range(DEPTHS), count)]
        return [rng.random() for _ in range(count)]

    def _haystack(
        self, spec: Spec, rng: random.Random, facts: Iterator[tuple[str, tuple[str, ...]]]
    ) -> tuple[Callable[[int], list[str]], str, str]:
        """What gives the first n units, what separates them, and a filler of the same kind."""
        if self.needles.haystack == "noise":
            return (lambda count: [NOISE] * count), "\n", NOISE + "\n"
        if self.needles.haystack == "essay":
            essay = load_essay(spec.sources.essay)
            start = rng.randrange(len(essay.sentences))
            return (lambda count: essay.run(start, count)), " ", essay.before(start)
        distractors: list[str] = []

        def first(count: int) -> list[str]:
            more = islice(facts, max(0, count - len(distractors)))
            distractors.extend(needle(self.needles.value_type, key, v[0]) for key, v in more)
            return distractors[:count]

        return first, "\n", NOISE + "\n"


def needle(value_type: str, key: str, value: str) -> str:
    """RULER's needle sentence."""
    return NEEDLE.format(type=value_type, key=key, value=value)


def question(value_type: str, keys: list[str], references: tuple[str, ...]) -> tuple[str, Query]:
    """RULER's preamble, and its question about one or several keys with the answer's beginning."""
    single = len(references) == 1
    preamble, text = _ONE if single else _MANY
    kind = value_type.removesuffix("s") if single else value_type
    query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
    filled = text.format(type=kind, query=query)
    return preamble.format(type=kind), Query(filled, references, ANSWER_TOKENS, "string_match_all")


def distinct_facts(
    rng: random.Random, key_type: str, value_type: str, values: int = 1
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Endless (key, values), no key and no value twice.

    The held-out words give 3.6 e5 different keys; then their words repeat with a number.
    """
    used: set[str] = set()

    def draw(kind: str) -> str:
        for attempt in range(1000):
            drawn = _draw(rng, kind) + (f"-{rng.randrange(1000)}" if attempt > 20 else "")
            if drawn not in used:
                used.add(drawn)
                return drawn
        raise AssertionError(f"no unused {kind} left after {len(used)}")

    while True:
        yield draw(key_type), tuple(draw(value_type) for _ in range(values))


def _draw(rng: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randrange(1_000_000, 10_000_000))
    if kind == "uuids":
        return random_uuid(rng)
    return f"{rng.choice(word_list('adjectives', True))}-{rng.choice(word_list('nouns', True))}"


for _name, _summary, _needles in (
    ("niah_single_1", "a number among noise", Needles("noise")),
    ("niah_single_2", "a number in an essay", Needles("essay")),
    ("niah_single_3", "a uuid in an essay", Needles("essay", value_type="uuids")),
    ("niah_multikey_1", "one of four numbers in an essay", Needles("essay", keys=4)),
    ("niah_multikey_2", "a number among needles", Needles("needles")),
    ("niah_multikey_3", "a uuid among needles of uuids", Needles("needles", "uuids", "uuids")),
    ("niah_multivalue", "four numbers of one key", Needles("essay", values=4)),
    ("niah_multiquery", "the numbers of four keys", Needles("essay", keys=4, queries=4)),
):
    register(NiahTask(_name, _summary, _needles))
