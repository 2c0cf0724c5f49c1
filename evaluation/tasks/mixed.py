"""One haystack, prefilled once, with many questions of mixed tasks.

Needles with numbers, words and uuids, chains of variables, pass keys with owners and JSON pairs
stand in the same noise or essay, each fact at a random depth. Many paired answers for one prefill
make small differences between methods visible; the intervals of a report resample whole haystacks,
because questions over one haystack are not independent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar

from evaluation.tasks.base import Sample, Spec, Task, register
from evaluation.tasks.draft import Draft, Query, fit
from evaluation.tasks.haystack import NOISE, load_essay, place
from evaluation.tasks.ruler_niah import distinct_facts, needle, question
from evaluation.tasks.ruler_vt import chain_names, chain_query, chain_sentences
from models.words import random_uuid

_PREAMBLE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
_ANSWER_TOKENS_MAX = 48
"""A mixed haystack asks for short answers only, so RULER's 128 tokens are not needed."""


@dataclass(frozen=True)
class Fact:
    """Sentences to hide, in their order, and what is asked about them."""

    sentences: tuple[str, ...]
    query: Query


class Mixed(Task):
    """Facts of every kind in one kind of filler."""

    suite: ClassVar[str] = "mixed"
    counts: ClassVar[dict[str, int]] = {
        "number": 10,
        "word": 4,
        "uuid": 4,
        "passkey": 6,
        "kv": 8,
        "vt": 4,
    }

    def __init__(self, name: str, summary: str, filler: str) -> None:
        super().__init__(name, summary)
        self._filler = filler

    def samples(self, spec: Spec) -> list[Sample]:
        """36 samples over one context."""
        rng = spec.rng(self.name)
        facts = [
            fact for kind, count in self.counts.items() for fact in islice(_KINDS[kind](rng), count)
        ]
        hidden: list[tuple[float, str]] = []
        for fact in facts:
            depths = sorted(rng.random() for _ in fact.sentences)
            hidden += zip(depths, fact.sentences, strict=True)
        queries = tuple(fact.query for fact in facts)
        if self._filler == "noise":
            separator, filler = "\n", NOISE + "\n"
            units: Callable[[int], list[str]] = lambda count: [NOISE] * count  # noqa: E731
        else:
            essay = load_essay(spec.sources.essay)
            start = rng.randrange(len(essay.sentences))
            separator, filler = " ", essay.before(start)
            units = lambda count: essay.run(start, count)  # noqa: E731

        def write(count: int) -> Draft:
            return Draft(_PREAMBLE, separator.join(place(units(count), hidden)), queries, filler)

        return fit(self.name, spec, write)


def _needles(kind: str, value_type: str) -> Callable[[random.Random], Iterator[Fact]]:
    def make(rng: random.Random) -> Iterator[Fact]:
        for key, values in distinct_facts(rng, "words", value_type):
            _, query = question(value_type, [key], values)
            short = replace(query, answer_tokens=_ANSWER_TOKENS_MAX, metadata={"kind": kind})
            yield Fact((needle(value_type, key, values[0]),), short)

    return make


def _passkeys(rng: random.Random) -> Iterator[Fact]:
    for owner, _ in distinct_facts(rng, "words", "numbers"):
        key = str(rng.randrange(10_000, 100_000))
        sentence = (
            f"The pass key for {owner} is {key}. Remember it. {key} is the pass key for {owner}."
        )
        text = f"\nWhat is the pass key for {owner}? The pass key for {owner} is"
        yield Fact((sentence,), Query(text, (key,), 16, "first_integer", {"kind": "passkey"}))


def _pairs(rng: random.Random) -> Iterator[Fact]:
    while True:
        key, value = random_uuid(rng), random_uuid(rng)
        text = f'\nKey: "{key}"\nThe value associated with the specified key is: "'
        query = Query(text, (value,), _ANSWER_TOKENS_MAX, "word_match", {"kind": "kv"})
        yield Fact((f'"{key}": "{value}",',), query)


def _chains(rng: random.Random) -> Iterator[Fact]:
    used: set[str] = set()
    while True:
        names, value = chain_names(rng), str(rng.randrange(10_000, 100_000))
        if used.isdisjoint({value, *names}):
            used.update((value, *names))
            query = replace(chain_query(value, names), metadata={"kind": "vt"})
            yield Fact(tuple(chain_sentences(value, names)), query)


_KINDS: dict[str, Callable[[random.Random], Iterator[Fact]]] = {
    "number": _needles("number", "numbers"),
    "word": _needles("word", "words"),
    "uuid": _needles("uuid", "uuids"),
    "passkey": _passkeys,
    "kv": _pairs,
    "vt": _chains,
}

register(Mixed("mixed_noise", "36 questions of six kinds over one noise haystack", "noise"))
register(Mixed("mixed_essay", "36 questions of six kinds over one essay haystack", "essay"))
