"""Evaluation contexts, made of what training never saw.

A context is one text and many questions about it, so that one prefill serves all of them. Keys are
`adjective-noun` pairs of held-out words, prose is the held-out part of `prose.py`, and every value
is drawn afresh. Kinds of haystack:

* noise, prose: RULER's noise sentences or natural text, with needles, pass keys and chains of
  variables;
* mixed: a third of each of noise, prose and kv, so that one prefill serves every task;
* kv, uuid: nothing but key-value pairs of numbers, or of uuids (InfiniteBench);
* needles: nothing but needles (RULER's multikey_2).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, islice

from tokenizers import Tokenizer

from models.prose import prose_text
from models.sequences import TrainingText
from models.tasks import (
    NOISE_SENTENCES,
    Fact,
    Question,
    Sampler,
    json_pair,
    named_passkey,
    needle,
    passkey,
    uuid_pair,
    variable_ruler,
    variable_words,
)
from models.words import random_uuid

HAYSTACKS = ("mixed", "noise", "prose", "kv", "uuid", "needles")

_QUESTION_TOKENS_MAX = 160
_QUESTIONS_PER_FULL_HAYSTACK = 24
_RULER_HOPS = 4


@dataclass(frozen=True)
class _Counts:
    """How many facts of each kind a haystack of noise or prose hides."""

    needles: int = 20
    word_needles: int = 4
    uuid_needles: int = 4
    named_passkeys: int = 10
    word_chains: int = 10
    ruler_chains: int = 10


_ALONE = _Counts()
_SHARED = _Counts(10, 2, 2, 5, 5, 5)


@dataclass(frozen=True)
class Context:
    """A haystack with questions. tokens: length of `text` without BOS."""

    haystack: str
    text: str
    tokens: int
    questions: tuple[Question, ...]


def make_context(haystack: str, length: int, seed: int, tokenizer: Tokenizer) -> Context:
    """A context such that BOS, text, question and answer fit `length` tokens.

    Raises ValueError for an unknown haystack, naming those that exist.
    """
    if haystack not in HAYSTACKS:
        raise ValueError(f"unknown haystack {haystack!r}; choose from {', '.join(HAYSTACKS)}")
    rng = random.Random(f"evaluation/{haystack}/{length}/{seed}")
    words = TrainingText(tokenizer).words
    sampler = Sampler(rng, words, held_out=True)
    budget = length - 1 - _QUESTION_TOKENS_MAX
    if haystack in ("noise", "prose"):
        text, questions = _sparse(haystack, budget, sampler, tokenizer, _ALONE)
    elif haystack == "mixed":
        text, questions = _mixed(budget, sampler, tokenizer)
    else:
        text, questions = _full(haystack, budget, sampler, tokenizer)
    return Context(haystack, text, _count(tokenizer, text), tuple(questions))


def _mixed(budget: int, sampler: Sampler, tokenizer: Tokenizer) -> tuple[str, list[Question]]:
    """A third noise, a third prose, a third key-value pairs; tasks say which third they are in."""
    noise, noise_questions = _sparse("noise", budget // 3, sampler, tokenizer, _SHARED)
    prose, prose_questions = _sparse("prose", budget // 3, sampler, tokenizer, _SHARED)
    pairs, pair_questions = _full("kv", budget // 3, sampler, tokenizer)
    questions = [replace(q, task=f"{q.task} in noise") for q in noise_questions]
    questions += [replace(q, task=f"{q.task} in prose") for q in prose_questions]
    return noise + prose + pairs, questions + pair_questions


def _sparse(
    haystack: str, budget: int, sampler: Sampler, tokenizer: Tokenizer, counts: _Counts
) -> tuple[str, list[Question]]:
    """Facts of every task spread evenly at random over filler."""
    facts = _hidden_facts(sampler, counts)
    budget -= sum(_count(tokenizer, s) for fact in facts for s in fact.sentences)
    filler = list(_filler(haystack, budget, sampler.rng, tokenizer))
    slots: dict[int, list[str]] = {}
    for fact in facts:
        # A chain's sentences keep their order, as in RULER.
        places = sorted(sampler.rng.randrange(len(filler) + 1) for _ in fact.sentences)
        for place, sentence in zip(places, fact.sentences, strict=True):
            slots.setdefault(place, []).append(sentence)
    pieces: list[str] = []
    for index in range(len(filler) + 1):
        pieces += slots.get(index, [])
        pieces += filler[index : index + 1]
    return "".join(pieces), [question for fact in facts for question in fact.questions]


def _hidden_facts(sampler: Sampler, counts: _Counts) -> list[Fact]:
    def several(maker: Callable[[], Fact | None], count: int) -> list[Fact]:
        made = (maker() for _ in range(1000))
        return list(islice((fact for fact in made if fact is not None), count))

    def hidden_needle(kind: str, task: str) -> Fact | None:
        key = sampler.adjective_noun()
        if not sampler.claim(key):
            return None
        values = {
            "numbers": sampler.number(7),
            "words": sampler.adjective_noun(),
            "uuids": random_uuid(sampler.rng),
        }
        return needle(sampler, key, values[kind], kind, task)

    return [
        *several(lambda: passkey(sampler), 1),
        *several(lambda: hidden_needle("numbers", "niah"), counts.needles),
        *several(lambda: hidden_needle("words", "niah_word"), counts.word_needles),
        *several(lambda: hidden_needle("uuids", "niah_uuid"), counts.uuid_needles),
        *several(lambda: named_passkey(sampler), counts.named_passkeys),
        *several(lambda: variable_words(sampler, sampler.rng.randrange(1, 5)), counts.word_chains),
        *several(lambda: variable_ruler(sampler, _RULER_HOPS), counts.ruler_chains),
    ]


def _filler(haystack: str, budget: int, rng: random.Random, tokenizer: Tokenizer) -> Iterator[str]:
    """Sentences of one kind of filler, `budget` tokens or a little less in all."""
    if haystack == "noise":
        sentences = [(s, _count(tokenizer, s)) for s in NOISE_SENTENCES]
        start = 0
    else:
        sentences = _held_out_sentences(tokenizer)
        start = rng.randrange(len(sentences))
    for sentence, tokens in islice(cycle(sentences), start, None):
        if tokens > budget:
            return
        budget -= tokens
        yield sentence


@cache
def _held_out_sentences(tokenizer: Tokenizer) -> list[tuple[str, int]]:
    """The held-out prose cut at ends of sentences and lines, each piece with its tokens."""
    pieces = re.split(r"(?<=[.!?])(?=\s)|(?=\n)", prose_text(True))
    encoded = tokenizer.encode_batch(pieces, add_special_tokens=False)
    return [(piece, len(e.ids)) for piece, e in zip(pieces, encoded, strict=True) if piece]


def _full(
    haystack: str, budget: int, sampler: Sampler, tokenizer: Tokenizer
) -> tuple[str, list[Question]]:
    """A haystack that is nothing but facts, and questions about some of them."""
    facts: list[Fact] = []
    while True:
        fact = _one_of_many(haystack, sampler)
        if fact is None:
            continue
        budget -= _count(tokenizer, fact.sentences[0])
        if budget < 0:
            break
        facts.append(fact)
    asked = sampler.rng.sample(facts, min(len(facts), _QUESTIONS_PER_FULL_HAYSTACK))
    text = "".join(fact.sentences[0] for fact in facts)
    return text, [question for fact in asked for question in fact.questions]


def _one_of_many(haystack: str, sampler: Sampler) -> Fact | None:
    if haystack == "uuid":
        return uuid_pair(sampler)
    if haystack == "kv":
        key = sampler.number(7)
        return json_pair(sampler, key, sampler.number(7), "kv") if sampler.claim(key) else None
    key = sampler.adjective_noun()
    if not sampler.claim(key):
        return None
    return needle(sampler, key, sampler.number(7), "numbers", "needles")


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)
