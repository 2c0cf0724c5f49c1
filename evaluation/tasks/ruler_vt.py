"""RULER's variable tracking: one chain of four assignments in noise (section 3.2).

The text begins with a solved example, as in RULER. Its answer's beginning ends with a space there;
the space is left out here, because most tokenizers join it to the next word.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import ClassVar

from evaluation.tasks.base import Sample, Spec, Task, register
from evaluation.tasks.draft import Draft, Query, fit
from evaluation.tasks.haystack import NOISE, place
from models.words import variable_name

ANSWER_TOKENS = 30
HOPS = 4

_PREAMBLE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)
_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above,"
    " {count} variables are assigned the value {value}, they are:"
)
_EXAMPLE_NOISES = 8
_EXAMPLE_VALUE = "12345"


class VariableTracking(Task):
    """RULER's vt."""

    suite: ClassVar[str] = "ruler"

    def samples(self, spec: Spec) -> list[Sample]:
        """One sample."""
        rng = spec.rng(self.name)
        example = _solved_example(rng)
        names = chain_names(rng)
        value = str(rng.randrange(10_000, 100_000))
        sentences = chain_sentences(value, names)
        depths = sorted(rng.random() for _ in sentences)
        query = chain_query(value, names)

        def write(count: int) -> Draft:
            hidden = list(zip(depths, sentences, strict=True))
            body = "\n".join(place([NOISE] * count, hidden))
            preamble = example + _PREAMBLE
            return Draft(preamble, body, (query,), NOISE + "\n", {"depths": depths})

        return fit(self.name, spec, write)


def chain_names(rng: random.Random, hops: int = HOPS) -> list[str]:
    """Distinct variables of five letters, one more than hops."""
    names: dict[str, None] = {}
    while len(names) <= hops:
        names[variable_name(rng)] = None
    return list(names)


def chain_sentences(value: str, names: list[str]) -> list[str]:
    """The assignments: the value to the first variable, each variable to the next."""
    first = f"VAR {names[0]} = {value}"
    return [first, *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]


def chain_query(value: str, names: list[str]) -> Query:
    """RULER's question for all variables of a value."""
    text = _QUESTION.format(value=value, count=len(names))
    return Query(text, tuple(names), ANSWER_TOKENS, "string_match_all")


def _solved_example(rng: random.Random) -> str:
    """A short text with its question and answer; its variables have three letters."""
    names = [name[:3] for name in chain_names(rng)]
    while len(set(names)) < len(names):
        names = [name[:3] for name in chain_names(rng)]
    sentences = chain_sentences(_EXAMPLE_VALUE, names)
    depths = sorted(rng.random() for _ in sentences)
    hidden = list(zip(depths, sentences, strict=True))
    body = "\n".join(place([NOISE] * _EXAMPLE_NOISES, hidden))
    question = chain_query(_EXAMPLE_VALUE, names).text
    return f"{_PREAMBLE}{body}{question} {' '.join(names)}\n\n"


register(VariableTracking("vt", "the five variables of a chain of assignments"))
