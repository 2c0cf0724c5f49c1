"""RULER's aggregation tasks: common words and frequent words (section 3.3).

cwe: a numbered list in which ten words occur 30 times and all others 3 times. fwe: coined words of
six letters whose frequencies follow a zeta distribution with alpha 2; the most frequent is "....".
"""

from __future__ import annotations

import random
import string
from functools import cache
from typing import ClassVar

from scipy.special import zeta

from evaluation.tasks.base import Sample, Spec, Task, register
from evaluation.tasks.draft import Draft, Query, fit
from evaluation.tasks.haystack import NOISE
from models.words import coined_word, word_list

_COMMON = 10
_SHORT_LENGTH = 4096

_CWE_PREAMBLE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_CWE_QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
_FWE_PREAMBLE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
_FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three"
    " most frequently appeared words in the above coded text? Answer: According to the coded text"
    " above, the three most frequently appeared words are:"
)


class CommonWords(Task):
    """RULER's cwe; below 4096 tokens with RULER's smaller counts."""

    suite: ClassVar[str] = "ruler"
    answer_tokens: ClassVar[int] = 120

    def samples(self, spec: Spec) -> list[Sample]:
        """One sample."""
        rng = spec.rng(self.name)
        short = spec.length < _SHORT_LENGTH
        words = _shuffled_words(rng)
        example_words = [words.pop() for _ in range(20 if short else 40)]
        example_repeats = (3, 1) if short else (10, 3)
        example = self._numbered(example_words, *example_repeats, f"{spec.seed}/{spec.index}")
        solved = " ".join(f"{i}. {word}" for i, word in enumerate(example_words[:_COMMON], 1))
        preamble = f"{_CWE_PREAMBLE}{example}{_CWE_QUESTION} {solved}\n{_CWE_PREAMBLE}"
        references = tuple(words[:_COMMON])
        query = Query(_CWE_QUESTION, references, self.answer_tokens, "string_match_all")
        repeats = (6, 1) if short else (30, 3)
        salt = rng.random()

        def write(count: int) -> Draft:
            while len(words) < count:
                words.append(coined_word(rng) + coined_word(rng))
            body = self._numbered(words[:count], *repeats, f"{salt}/{count}")
            return Draft(preamble, body, (query,), NOISE + " ")

        return fit(self.name, spec, write, least=_COMMON + 1)

    @staticmethod
    def _numbered(words: list[str], common: int, others: int, salt: str) -> str:
        listed = words[:_COMMON] * common + words[_COMMON:] * others
        random.Random(salt).shuffle(listed)
        return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))


class FrequentWords(Task):
    """RULER's fwe; the vocabulary has a fiftieth of the length, as RULER's has."""

    suite: ClassVar[str] = "ruler"
    answer_tokens: ClassVar[int] = 50
    alpha: ClassVar[float] = 2.0

    def samples(self, spec: Spec) -> list[Sample]:
        """One sample."""
        rng = spec.rng(self.name)
        coded: dict[str, None] = {}
        while len(coded) < max(8, spec.length // 50):
            coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        vocabulary = ["....", *coded]
        references = tuple(vocabulary[1:4])
        query = Query(_FWE_QUESTION, references, self.answer_tokens, "string_match_all")
        salt = rng.random()

        def write(count: int) -> Draft:
            words = [w for w, times in self._frequencies(vocabulary, count) for _ in range(times)]
            random.Random(f"{salt}/{count}").shuffle(words)
            return Draft(_FWE_PREAMBLE, " ".join(words), (query,), ".... ")

        # With 60 words the second, third and fourth rank occur 9, 4 and 2 times: no ties.
        return fit(self.name, spec, write, least=60)

    def _frequencies(self, vocabulary: list[str], count: int) -> list[tuple[str, int]]:
        normaliser = float(zeta(self.alpha))
        return [
            (word, int(count * rank**-self.alpha / normaliser))
            for rank, word in enumerate(vocabulary, 1)
        ]


def _shuffled_words(rng: random.Random) -> list[str]:
    words = list(_every_word())
    rng.shuffle(words)
    return words


@cache
def _every_word() -> tuple[str, ...]:
    """The adjectives and nouns that RULER draws from; when they run out, words are coined."""
    lists = [word_list(kind, part) for kind in ("adjectives", "nouns") for part in (False, True)]
    return tuple(sorted({word for words in lists for word in words}))


register(CommonWords("cwe", "the ten most common words of a list"))
register(FrequentWords("fwe", "the three most frequent coined words"))
