"""Needle in a haystack: one magic number in an essay, at ten depths, over lengths.

A round visits every depth once. The report draws score over length and depth as a heatmap.
"""

from __future__ import annotations

import random
from typing import ClassVar

from evaluation.tasks.base import Sample, Spec, Task, register
from evaluation.tasks.draft import Draft, Query, fit
from evaluation.tasks.haystack import load_essay, place
from models.words import word_list

DEPTHS = 10
ANSWER_TOKENS = 16


class Needle(Task):
    """The heatmap test."""

    suite: ClassVar[str] = "needle"
    per_round: ClassVar[int] = DEPTHS

    def samples(self, spec: Spec) -> list[Sample]:
        """One sample at depth index/9 of its round."""
        rng = spec.rng(self.name)
        depth = spec.index % DEPTHS / (DEPTHS - 1)
        _, sentence, query = magic_city(rng)
        essay = load_essay(spec.sources.essay)
        start = rng.randrange(len(essay.sentences))
        preamble = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize it. I will quiz you about it.\n"
        )

        def write(count: int) -> Draft:
            body = " ".join(place(essay.run(start, count), [(depth, sentence)]))
            return Draft(preamble, body, (query,), essay.before(start), {"depth": depth})

        return fit(self.name, spec, write)


def magic_city(rng: random.Random) -> tuple[str, str, Query]:
    """A city, the sentence that gives its number, and the question for it."""
    city = rng.choice(word_list("nouns", True)).capitalize()
    number = str(rng.randrange(1_000_000, 10_000_000))
    query = Query(
        f"\nWhat is the special magic {city} number? The special magic {city} number is:",
        (number,),
        ANSWER_TOKENS,
        "string_match_all",
    )
    return city, f"The special magic {city} number is: {number}.", query


register(Needle("needle", "one number in an essay, at ten depths a round"))
