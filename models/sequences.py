"""Packs facts, filler and questions into training batches.

A sequence is `[BOS] haystack questions`: sentences and filler in random order, then questions, with
the loss on their answers only. Three devices let sequences of 256-512 tokens stand for 128K:

* PoSE positions: the position ids jump at sentence boundaries, so a sequence spans up to 200K;
* the dilution mark: filler and needles that no question asks for carry a weight by which attention
  counts each as up to 600 tokens (`primed.dilution_mask`);
* keys drawn from small pools shared by the batch, so that the other sequences, which the last layer
  also attends to, hold near misses of every key.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from models.prose import prose_text, source_text
from models.tasks import (
    NOISE_SENTENCES,
    PREAMBLES,
    TRAINING_TASKS,
    Fact,
    Question,
    Sampler,
    needle,
    passkey,
)
from models.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, pinned_words
from models.words import word_list

_FIRST_ORDINARY_ID = PAD_ID + 1
_PROSE_CHARS = 900_000
_SOURCE_CHARS = 700_000
_SPAN_MAX = 200_000
_LONG_SPAN_MIN = 32_000
_LONG_SPAN_SHARE = 0.3


class TrainingText:
    """The tokenizer with what training reads through it: encoded filler and single-token words."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; short texts are remembered."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(text) < 200 and len(self._cache) < 20_000:
                self._cache[text] = ids
        return ids

    @cached_property
    def filler(self) -> npt.NDArray[np.int32]:
        """Token ids of the training part of prose and library sources, int32 [tokens]."""
        texts = (prose_text(False)[:_PROSE_CHARS], source_text(False)[:_SOURCE_CHARS])
        return np.concatenate([np.array(self.encode(text), dtype=np.int32) for text in texts])

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Listed words of the training part that are one token, with and without a space."""
        listed = {*word_list("adjectives", False), *word_list("nouns", False), *pinned_words()}
        return tuple(
            word
            for word in sorted(listed)
            if len(self.encode(word)) == 1 and len(self.encode(f" {word}")) == 1
        )


@dataclass
class Sequence:
    """One training sequence before padding.

    ids: token ids. supervised: per token, whether its prediction counts. diluted: per token,
    whether attention may count it many times. cuts: indices where positions may jump.
    """

    task: str
    ids: list[int]
    supervised: list[bool]
    diluted: list[bool]
    cuts: list[int]

    def append(self, ids: list[int], supervised: bool = False, diluted: bool = False) -> None:
        """Adds tokens that share their marks."""
        self.ids += ids
        self.supervised += [supervised] * len(ids)
        self.diluted += [diluted] * len(ids)

    def cut(self) -> None:
        """Allows a position jump before the next token."""
        self.cuts.append(len(self.ids))


@dataclass(frozen=True)
class Batch:
    """A padded batch; every array is [sequences, length].

    ids: int64. positions: int64, strictly increasing. supervised: bool, token t is a target.
    dilution: float32, natural log of how many tokens each counts for. tasks: one name per sequence.
    """

    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    supervised: npt.NDArray[np.bool_]
    dilution: npt.NDArray[np.float32]
    tasks: list[str]


def copy_sequence(length: int, rng: random.Random) -> Sequence:
    """Random blocks, then the same blocks in another order: pure copying, no language."""
    pool_size = rng.choice((None, None, 12, 24, 64))
    pool = range(_FIRST_ORDINARY_ID, VOCAB_SIZE)
    tokens = pool if pool_size is None else rng.sample(pool, pool_size)
    block = rng.choice((2, 3, 4, 6, 8, 16))
    blocks = [[rng.choice(tokens) for _ in range(block)] for _ in range((length // 2) // block)]
    # Tokens that say which block is being copied: more where the pool is small.
    given = 1 if pool_size is None else min(3, block - 1)
    sequence = Sequence("copy", [BOS_ID], [False], [False], [])
    for ids in blocks:
        sequence.cut()
        sequence.append(ids)
    for ids in rng.sample(blocks, len(blocks)):
        sequence.cut()
        sequence.append(ids[:given])
        sequence.append(ids[given:], supervised=True)
    return sequence


def task_sequence(
    length: int, sampler: Sampler, text: TrainingText, variable_boost: float = 1.0
) -> Sequence:
    """A haystack of one or two tasks and questions about it, at most `length` tokens.

    variable_boost: how many times more often than usual variable tracking is drawn.
    """
    rng = sampler.rng
    all_needles = rng.random() < 0.3
    share = 0.6 if all_needles else rng.choice((0.15, 0.25, 0.35, 0.45, 0.5))
    facts = _draw_facts(int(length * share), sampler, text, variable_boost)
    asked = _draw_questions(facts, int(length * rng.choice((0.3, 0.35, 0.4))), rng, text)

    dilute_unasked = rng.random() < 0.6
    haystack: list[tuple[list[int], bool]] = []
    for index, fact in enumerate(facts):
        diluted = dilute_unasked and all(index != question.fact for question in asked)
        haystack += [(text.encode(sentence), diluted) for sentence in fact.sentences]
    preamble = text.encode(rng.choice(PREAMBLES)) if rng.random() < 0.2 else []
    room = length - 1 - len(preamble)
    room -= sum(len(question.prompt) + len(question.target) for question in asked)
    room -= sum(len(ids) for ids, _ in haystack)
    if not all_needles:
        haystack += [(ids, True) for ids in _draw_filler(room, rng, text)]
    rng.shuffle(haystack)

    kinds = sorted({fact.task for fact in facts if fact.task != "passkey"})
    task = kinds[0] if len(kinds) == 1 else "mixed"
    sequence = Sequence(task, [BOS_ID], [False], [False], [])
    sequence.append(preamble, diluted=True)
    for ids, diluted in haystack:
        sequence.cut()
        sequence.append(ids, diluted=diluted)
    for question in asked:
        sequence.cut()
        sequence.append(question.prompt)
        sequence.append(question.target, supervised=True)
    return sequence


@dataclass(frozen=True)
class _AskedQuestion:
    """A question as tokens: the index of its fact, what is given and what is to be predicted."""

    fact: int
    prompt: list[int]
    target: list[int]


def _draw_facts(
    budget_tokens: int, sampler: Sampler, text: TrainingText, variable_boost: float
) -> list[Fact]:
    """Facts of one or two tasks until their sentences fill the budget."""
    rng = sampler.rng
    makers = [maker for maker, _ in TRAINING_TASKS.values()]
    weights = [
        weight * (variable_boost if name.startswith("vt") else 1.0)
        for name, (_, weight) in TRAINING_TASKS.items()
    ]
    drawn = rng.choices(makers, weights, k=rng.choice((1, 1, 2)))
    facts: list[Fact] = []
    if rng.random() < 0.15:
        key = passkey(sampler)
        facts += [key] if key is not None else []
    used_tokens = 0
    for attempt in range(200):
        fact = rng.choice(drawn)(sampler)
        if fact is None:
            # Small pools run out of keys; a few refusals in a row mean the haystack is full.
            if attempt > 60 and facts:
                break
            continue
        facts.append(fact)
        used_tokens += sum(len(text.encode(sentence)) for sentence in fact.sentences)
        if used_tokens >= budget_tokens:
            break
    return facts or [needle(sampler, sampler.number(8), sampler.number(7), "numbers")]


def _draw_questions(
    facts: list[Fact], budget_tokens: int, rng: random.Random, text: TrainingText
) -> list[_AskedQuestion]:
    """Questions in random order until they fill the budget; at least one.

    In half of the sequences every answer is closed by EOS, so that generation learns to stop.
    """
    closing = [EOS_ID] if rng.random() < 0.5 else []
    order: list[tuple[int, Question]] = [
        (index, question) for index, fact in enumerate(facts) for question in fact.questions
    ]
    rng.shuffle(order)
    order = order[: max(1, round(len(order) * rng.choice((0.5, 0.8, 1.0, 1.0))))]
    asked: list[_AskedQuestion] = []
    used_tokens = 0
    for index, question in order:
        target = text.encode(question.answer + question.terminator) + closing
        entry = _AskedQuestion(index, text.encode(question.prompt), target)
        cost = len(entry.prompt) + len(entry.target)
        if asked and used_tokens + cost > budget_tokens:
            break
        asked.append(entry)
        used_tokens += cost
    return asked


def _draw_filler(room: int, rng: random.Random, text: TrainingText) -> list[list[int]]:
    """Pieces of one kind of filler, `room` tokens or a little less in all."""
    kind = rng.choice(("noise", "noise", "prose", "prose", "prose", "words", "random"))
    pieces: list[list[int]] = []
    while room > 3:
        piece = _filler_piece(kind, rng, text)[:room]
        pieces.append(piece)
        room -= len(piece)
    return pieces


def _filler_piece(kind: str, rng: random.Random, text: TrainingText) -> list[int]:
    if kind == "noise":
        return [token for sentence in NOISE_SENTENCES for token in text.encode(sentence)]
    if kind == "prose":
        count = rng.randrange(8, 64)
        start = rng.randrange(len(text.filler) - count)
        return [int(token) for token in text.filler[start : start + count]]
    if kind == "words":
        words = [rng.choice(text.words) for _ in range(rng.randrange(4, 12))]
        return [text.encode(f" {word}")[0] for word in words] + text.encode(".")
    return [rng.randrange(_FIRST_ORDINARY_ID, VOCAB_SIZE) for _ in range(rng.randrange(4, 20))]


def pose_positions(
    length: int, cuts: list[int], rng: random.Random, span_max: int = _SPAN_MAX
) -> npt.NDArray[np.int64]:
    """Position ids int64 [length] that span between `length` and `span_max`, log-uniformly.

    Three sequences in ten span at least 32,000, because log-uniform spans are rarely that long. The
    span beyond `length` is spread over a few jumps at `cuts` (PoSE, arXiv 2309.10400).
    """
    steps = np.ones(length, np.int64)
    steps[0] = 0
    shortest = max(length, _LONG_SPAN_MIN) if rng.random() < _LONG_SPAN_SHARE else length
    extra = math.exp(rng.uniform(math.log(shortest), math.log(span_max))) - length
    cuts = [cut for cut in cuts if 0 < cut < length]
    chosen = rng.sample(cuts, min(len(cuts), rng.choice((1, 2, 4, 8, 16))))
    weights = [rng.random() ** 2 + 1e-3 for _ in chosen]
    for cut, weight in zip(chosen, weights, strict=True):
        steps[cut] += int(extra * weight / sum(weights))
    return np.cumsum(steps)


def make_batch(
    sequences: int,
    length: int,
    rng: random.Random,
    text: TrainingText,
    multiplicity_max: float,
    copy_share: float,
    variable_boost: float = 1.0,
) -> Batch:
    """A batch of copy and task sequences.

    multiplicity_max: the most tokens a diluted token may stand for; each sequence draws its own,
        log-uniform from 1. copy_share: the share of copy sequences. variable_boost: see
        `task_sequence`.
    """
    shape = (sequences, length)
    ids = np.full(shape, PAD_ID, np.int64)
    positions = np.zeros(shape, np.int64)
    supervised = np.zeros(shape, np.bool_)
    dilution = np.zeros(shape, np.float32)
    tasks: list[str] = []
    pools = _SharedPools(rng, text)
    for row in range(sequences):
        if rng.random() < copy_share:
            sequence = copy_sequence(length, rng)
        else:
            sequence = task_sequence(length, pools.sampler(), text, variable_boost)
        n = min(length, len(sequence.ids))
        ids[row, :n] = sequence.ids[:n]
        supervised[row, :n] = sequence.supervised[:n]
        dilution[row, :n] = sequence.diluted[:n]
        dilution[row] *= math.log(multiplicity_max) * rng.random()
        positions[row] = pose_positions(length, sequence.cuts, rng)
        tasks.append(sequence.task)
    return Batch(ids, positions, supervised, dilution, tasks)


class _SharedPools:
    """Small pools of words and digit groups shared by a batch, and its one set of used keys.

    Sharing `used` keeps every key of a batch unique: a question never has two right answers, though
    the last layer sees the haystacks of all sequences.
    """

    def __init__(self, rng: random.Random, text: TrainingText) -> None:
        self._rng = rng
        self._words = text.words
        self._used: set[str] = set()
        self._pool_words = self._draw_words((30, 60, 120))
        self._pool_digits = self._draw_digits((20, 40, 80))

    def sampler(self) -> Sampler:
        """A sampler for one sequence: its own tiny pools, the batch's pools or no pools."""
        draw = self._rng.random()
        if draw < 0.3:
            words, digits = self._draw_words((6, 10, 16)), self._draw_digits((4, 6, 10))
            return Sampler(self._rng, words, digit_groups=digits, used=self._used)
        if draw < 0.65:
            return Sampler(
                self._rng, self._pool_words, digit_groups=self._pool_digits, used=self._used
            )
        return Sampler(self._rng, self._words, used=self._used)

    def _draw_words(self, sizes: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(self._rng.sample(self._words, self._rng.choice(sizes)))

    def _draw_digits(self, sizes: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(str(self._rng.randrange(100, 1000)) for _ in range(self._rng.choice(sizes)))
