"""One haystack, prefilled once, with many questions of mixed tasks.

Needles with numbers, words and uuids, pass keys, magic cities and chains of variables are hidden in
noise, in an essay, or in half of each; pairs of numbers and of uuids are hidden there too, or make
up a third part of their own, as in InfiniteBench. Up to 24 questions of each of the eight kinds
make 192 paired answers for one prefill; facts never take more than half of a haystack, so a short
one has fewer. The intervals of a report resample whole haystacks, because questions over one
haystack are not independent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import ClassVar, Protocol

from evaluation.encoding import Encoder
from evaluation.tasks.base import Sample, Spec, Task, register
from evaluation.tasks.draft import Draft, Query, fit
from evaluation.tasks.haystack import NOISE, load_essay, place
from evaluation.tasks.needle import magic_city
from evaluation.tasks.ruler_niah import distinct_facts, needle, question
from evaluation.tasks.ruler_vt import chain_names, chain_query, chain_sentences

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
    """Facts of every kind in parts "noise", "essay" and "pairs"."""

    suite: ClassVar[str] = "mixed_haystack"
    questions_per_kind: ClassVar[int] = 24

    def __init__(self, name: str, summary: str, parts: tuple[str, ...]) -> None:
        super().__init__(name, summary)
        self._parts = parts

    def samples(self, spec: Spec) -> list[Sample]:
        """All questions over one context, the kinds in turn."""
        rng = spec.rng(self.name)
        per_kind = self._per_kind(spec)
        makers = _hidden_kinds(rng)
        if "pairs" not in self._parts:
            makers |= _pair_kinds(rng)
        facts = [fact for make in makers.values() for fact in islice(make, per_kind)]
        fillers = [part for part in self._parts if part != "pairs"]
        shares = dict(zip(fillers, _deal(rng, facts, len(fillers)), strict=True))
        parts: list[_Part] = [
            _Filled(rng, spec, filler, hidden) for filler, hidden in shares.items()
        ]
        if "pairs" in self._parts:
            parts.append(_Pairs(rng, spec.encoder, per_kind))

        def write(count: int) -> Draft:
            bodies = [part.body(count) for part in parts]
            queries = [query for part in parts for query in part.queries(count)]
            return Draft(_PREAMBLE, "\n".join(bodies), _in_turn(queries), NOISE + "\n")

        return fit(self.name, spec, write)

    def _per_kind(self, spec: Spec) -> int:
        """So many that facts take at most half of the haystack, and at least one."""
        rng = random.Random(0)
        one_each = [next(make) for make in (_hidden_kinds(rng) | _pair_kinds(rng)).values()]
        tokens = sum(spec.encoder.count(s) for fact in one_each for s in fact.sentences)
        return max(1, min(self.questions_per_kind, spec.length // 2 // tokens))


class _Part(Protocol):
    """A part of a haystack that grows with `count`; all parts grow alike in tokens."""

    def body(self, count: int) -> str:
        """The text."""

    def queries(self, count: int) -> Sequence[Query]:
        """What is asked about the text."""


class _Filled:
    """Noise or an essay with facts hidden in it; `count` units are `count` times the noise."""

    def __init__(self, rng: random.Random, spec: Spec, filler: str, facts: Sequence[Fact]) -> None:
        self._hidden: list[tuple[float, str]] = []
        for fact in facts:
            # A chain's sentences keep their order, as in RULER.
            depths = sorted(rng.random() for _ in fact.sentences)
            self._hidden += zip(depths, fact.sentences, strict=True)
        self._queries = [
            replace(fact.query, metadata={**fact.query.metadata, "part": filler}) for fact in facts
        ]
        if filler == "noise":
            self._separator = "\n"
            self._units: Callable[[int], list[str]] = lambda count: [NOISE] * count
            return
        essay = load_essay(spec.sources.essay)
        start = rng.randrange(len(essay.sentences))
        sentence = spec.encoder.count(" ".join(essay.run(start, 50))) / 50
        rate = spec.encoder.count(NOISE) / sentence
        self._separator = " "
        self._units = lambda count: essay.run(start, round(count * rate))

    def body(self, count: int) -> str:
        return self._separator.join(place(self._units(count), self._hidden))

    def queries(self, count: int) -> Sequence[Query]:
        return self._queries


class _Pairs:
    """Nothing but pairs, of numbers and of uuids in turn; those asked are spread evenly."""

    def __init__(self, rng: random.Random, encoder: Encoder, per_kind: int) -> None:
        self._per_kind = per_kind
        self._makers = _pair_kinds(rng)
        self._couples: list[list[Fact]] = []
        couple = sum(encoder.count(next(make).sentences[0]) for make in self._makers.values())
        self._rate = encoder.count(NOISE) / couple
        self._draws = [rng.random() for _ in range(per_kind)]

    def body(self, count: int) -> str:
        return " ".join(fact.sentences[0] for couple in self._made(count) for fact in couple)

    def queries(self, count: int) -> Sequence[Query]:
        made = self._made(count)
        # One of each of as many equal runs of couples.
        starts = [run * len(made) // self._per_kind for run in range(self._per_kind + 1)]
        asked = [
            made[start + int(draw * (stop - start))]
            for draw, (start, stop) in zip(self._draws, pairwise(starts), strict=True)
        ]
        return [
            replace(couple[kind].query, metadata={**couple[kind].query.metadata, "part": "pairs"})
            for kind in range(len(self._makers))
            for couple in asked
        ]

    def _made(self, count: int) -> list[list[Fact]]:
        wanted = max(self._per_kind, round(count * self._rate))
        while len(self._couples) < wanted:
            self._couples.append([next(make) for make in self._makers.values()])
        return self._couples[:wanted]


def _in_turn(queries: Sequence[Query]) -> tuple[Query, ...]:
    """One query of each kind after the other: whoever stops early has asked some of each."""
    kinds: dict[str, list[Query]] = {}
    for query in queries:
        kinds.setdefault(query.metadata["kind"], []).append(query)
    return tuple(query for turn in zip(*kinds.values(), strict=True) for query in turn)


def _deal(rng: random.Random, facts: Sequence[Fact], hands: int) -> list[list[Fact]]:
    """The facts in `hands` parts, those of each kind spread over all parts."""
    offset = rng.randrange(hands)
    return [list(facts[(offset + hand) % hands :: hands]) for hand in range(hands)]


def _hidden_kinds(rng: random.Random) -> dict[str, Iterator[Fact]]:
    """Endless facts by kind; no key belongs to two facts."""
    keys = (key for key, _ in distinct_facts(rng, "words", "numbers"))
    return {
        "number": _needles(rng, keys, "number", "numbers"),
        "word": _needles(rng, keys, "word", "words"),
        "uuid": _needles(rng, keys, "uuid", "uuids"),
        "passkey": _passkeys(rng, keys),
        "city": _cities(rng),
        "vt": _chains(rng),
    }


def _pair_kinds(rng: random.Random) -> dict[str, Iterator[Fact]]:
    return {"kv": _pairs(rng, "kv", "numbers"), "kv_uuid": _pairs(rng, "kv_uuid", "uuids")}


def _needles(rng: random.Random, keys: Iterator[str], kind: str, value_type: str) -> Iterator[Fact]:
    values = (values for _, values in distinct_facts(rng, "uuids", value_type))
    for key, value in zip(keys, values, strict=False):
        _, query = question(value_type, [key], value)
        short = replace(query, answer_tokens=_ANSWER_TOKENS_MAX, metadata={"kind": kind})
        yield Fact((needle(value_type, key, value[0]),), short)


def _passkeys(rng: random.Random, keys: Iterator[str]) -> Iterator[Fact]:
    for owner in keys:
        key = str(rng.randrange(10_000, 100_000))
        sentence = (
            f"The pass key for {owner} is {key}. Remember it. {key} is the pass key for {owner}."
        )
        text = f"\nWhat is the pass key for {owner}? The pass key for {owner} is"
        yield Fact((sentence,), Query(text, (key,), 16, "first_integer", {"kind": "passkey"}))


def _cities(rng: random.Random) -> Iterator[Fact]:
    used: set[str] = set()
    while True:
        city, sentence, query = magic_city(rng)
        if city not in used:
            used.add(city)
            yield Fact((sentence,), replace(query, metadata={"kind": "city"}))


def _pairs(rng: random.Random, kind: str, value_type: str) -> Iterator[Fact]:
    for key, (value,) in distinct_facts(rng, value_type, value_type):
        text = f'\nKey: "{key}"\nThe value associated with the specified key is: "'
        query = Query(text, (value,), _ANSWER_TOKENS_MAX, "word_match", {"kind": kind})
        yield Fact((f'"{key}": "{value}",',), query)


def _chains(rng: random.Random) -> Iterator[Fact]:
    used: set[str] = set()
    while True:
        names, value = chain_names(rng), str(rng.randrange(10_000, 100_000))
        if used.isdisjoint({value, *names}):
            used.update((value, *names))
            query = replace(chain_query(value, names), metadata={"kind": "vt"})
            yield Fact(tuple(chain_sentences(value, names)), query)


_KINDS_TEXT = "questions of eight kinds over one haystack of"
register(
    Mixed(
        "mixed", f"{_KINDS_TEXT} noise, essay and pairs, a third each", ("noise", "essay", "pairs")
    )
)
register(Mixed("mixed_noise", f"{_KINDS_TEXT} noise", ("noise",)))
register(Mixed("mixed_essay", f"{_KINDS_TEXT} essay", ("essay",)))
