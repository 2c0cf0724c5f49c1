"""InfiniteBench's synthetic tasks, made here at any length (arXiv 2402.13718, section 3).

    passkey, number_string   a key at one of 59 equally spaced depths of noise
    kv_retrieval             a JSON object of uuid pairs (2500 pairs at the published length)
    code_run                 a chain of function calls among other functions
    math_find                a rank statistic of a long list
    math_calc                all running values of a long sum

Wording is the benchmark's form for base models, each prompt ending where the answer begins. Two
differences: a prompt does not end with a space, and kv_retrieval ends with the opening quote.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import ClassVar

from evaluation.encoding import Encoder
from evaluation.tasks.base import Sample, Spec, Task, register
from evaluation.tasks.draft import Draft, Query, fit
from evaluation.tasks.haystack import NOISE, place
from models.words import random_uuid

DEPTHS = 59
_DEPTH_STRIDE = 23
"""Coprime with 59: haystacks visit every depth, and few of them are spread."""


_CAREFULLY = "Read what follows with care.\n"
"""Filler without a number, which would belong to the list or sum."""


class NoiseKey(Task):
    """passkey or number_string: a key said twice in one line of noise."""

    suite: ClassVar[str] = "infinitebench"

    def __init__(
        self, name: str, summary: str, what: str, key: Callable[[random.Random], str], answer: int
    ) -> None:
        super().__init__(name, summary)
        self._what = what
        self._key = key
        self._answer_tokens = answer

    def samples(self, spec: Spec) -> list[Sample]:
        """One sample."""
        key = self._key(spec.rng(self.name))
        depth = (spec.index * _DEPTH_STRIDE % DEPTHS) / (DEPTHS - 1)
        what = self._what
        line = f"The {what} is {key}. Remember it. {key} is the {what}."
        preamble = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize them. I will quiz you about the important information there.\n\n"
        )
        query = Query(
            f"\n\nWhat is the {what}? The {what} is", (key,), self._answer_tokens, "first_integer"
        )

        def write(count: int) -> Draft:
            body = "\n".join(place([NOISE] * count, [(depth, line)]))
            return Draft(preamble, body, (query,), NOISE + "\n", {"depth": depth})

        return fit(self.name, spec, write)


class KeyValues(Task):
    """kv_retrieval: one of many uuid pairs."""

    suite: ClassVar[str] = "infinitebench"
    answer_tokens: ClassVar[int] = 50

    def samples(self, spec: Spec) -> list[Sample]:
        """One sample; pairs are asked at evenly spread depths."""
        rng = spec.rng(self.name)
        pairs: list[tuple[str, str]] = []
        depth = (spec.index * _DEPTH_STRIDE % DEPTHS + 0.5) / DEPTHS

        def write(count: int) -> Draft:
            while len(pairs) < count:
                pairs.append((random_uuid(rng), random_uuid(rng)))
            key, value = pairs[int(depth * count)]
            listed = ", ".join(f'"{k}": "{v}"' for k, v in pairs[:count])
            preamble = (
                "Extract the value corresponding to the specified key in the JSON object below.\n\n"
            )
            text = f'\n\nKey: "{key}"\nThe value associated with the specified key is: "'
            query = Query(text, (value,), self.answer_tokens, "word_match")
            body = f"JSON data:\n{{{listed}}}"
            return Draft(preamble, body, (query,), NOISE + "\n", {"depth": depth})

        return fit(self.name, spec, write)


class CodeRun(Task):
    """code_run: the value of a call through two to ten functions."""

    suite: ClassVar[str] = "infinitebench"
    answer_tokens: ClassVar[int] = 5

    def samples(self, spec: Spec) -> list[Sample]:
        """One sample."""
        rng = spec.rng(self.name)
        calls = rng.randrange(2, 11)
        names = [f"func_{number}" for number in rng.sample(range(100_000), 100_000)]
        chain = [(names.pop(), rng.choice((-1, 1)) * rng.randrange(1, 11)) for _ in range(calls)]
        depths = [rng.random() for _ in chain]
        argument = rng.randrange(10)
        value = argument + sum(added for _, added in chain)
        inner = [*(name for name, _ in chain[1:]), ""]
        functions = [
            (depth, _function(name, callee, added))
            for depth, (name, added), callee in zip(depths, chain, inner, strict=True)
        ]
        call = f"{chain[0][0]}({argument})"
        preamble = f"There is a function called {chain[0][0]} in the following Python code.\n\n"
        text = f"\n\nPlease compute the exact value of {call}. The value of {call} is"
        query = Query(text, (str(value),), self.answer_tokens, "last_integer", {"calls": calls})
        others: list[str] = []

        def write(count: int) -> Draft:
            while len(others) < count:
                # Others call what was defined before them, so that no chain is longer than ten.
                callee = names[-len(others)] if len(others) % 5 else ""
                added = rng.choice((-1, 1)) * rng.randrange(1, 11)
                others.append(_function(names[-1 - len(others)], callee, added))
            body = "\n\n".join(place(others[:count], functions))
            return Draft(preamble, body, (query,), "# Some functions follow.\n")

        return fit(self.name, spec, write, most=len(names))


class MathFind(Task):
    """math_find: one of seven rank statistics of a list of integers."""

    suite: ClassVar[str] = "infinitebench"
    answer_tokens: ClassVar[int] = 3
    finders: ClassVar[dict[str, Callable[[list[int]], int]]] = {
        "largest": lambda numbers: sorted(set(numbers))[-1],
        "second largest": lambda numbers: sorted(set(numbers))[-2],
        "third largest": lambda numbers: sorted(set(numbers))[-3],
        "smallest": lambda numbers: sorted(set(numbers))[0],
        "second smallest": lambda numbers: sorted(set(numbers))[1],
        "third smallest": lambda numbers: sorted(set(numbers))[2],
        "median": statistics.median_low,
    }

    def samples(self, spec: Spec) -> list[Sample]:
        """One sample; haystacks take the statistics in turn."""
        rng = spec.rng(self.name)
        kind = list(self.finders)[spec.index % len(self.finders)]
        low, high = rng.randrange(10, 40), rng.randrange(60, 100)
        numbers: list[int] = []

        def write(count: int) -> Draft:
            while len(numbers) < count:
                numbers.append(rng.randint(low, high))
            shown = numbers[:count]
            answer = str(self.finders[kind](shown))
            text = (
                "\n\nYou should answer with only one number, no other words. "
                f"The {kind} number of the list is:"
            )
            query = Query(text, (answer,), self.answer_tokens, "first_number", {"statistic": kind})
            preamble = f"Find the {kind} number from the list below:\n\n"
            return Draft(preamble, f"[{', '.join(map(str, shown))}]", (query,), _CAREFULLY)

        return fit(self.name, spec, write, least=32)


class MathCalc(Task):
    """math_calc: every running value of a sum of small numbers, none below zero.

    Half of the length is generated. The published score reads unsigned integers, so running values
    stay at zero or above.
    """

    suite: ClassVar[str] = "infinitebench"

    def samples(self, spec: Spec) -> list[Sample]:
        """One sample."""
        rng = spec.rng(self.name)
        terms = [rng.randrange(1, 10)]
        preamble = (
            "Let us calculate the intermediate values of an expression.\n\n"
            "Expression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
            "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\n"
        )

        totals = list(terms)

        def write(count: int) -> Draft:
            while len(terms) < count:
                terms.append(rng.randint(-min(totals[-1], 9), 9) or 1)
                totals.append(totals[-1] + terms[-1])
            shown = terms[:count]
            values = [str(total) for total in totals[:count]]
            expression = str(shown[0]) + "".join(f" {'+-'[t < 0]} {abs(t)}" for t in shown[1:])
            query = _running_values(values, spec.encoder)
            return Draft(preamble, f"Expression: {expression}", (query,), _CAREFULLY)

        return fit(self.name, spec, write, least=2)


def _running_values(values: list[str], encoder: Encoder) -> Query:
    # Two more tokens leave room for another way to break the list into tokens.
    answer_tokens = encoder.count(f" [{', '.join(values)}]") + 2
    return Query("\nValues:", tuple(values), answer_tokens, "running_values")


def _function(name: str, callee: str, added: int) -> str:
    inner = f"{callee}(x)" if callee else "x"
    return f"def {name}(x):\n    return {inner} {'+-'[added < 0]} {abs(added)}"


def _five_digits(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _paired_digits(rng: random.Random) -> str:
    """Ten digits, half of them repeats of a neighbour: hard to copy, as published."""
    digits = list(str(rng.randrange(10_000, 100_000)))
    for done in range(5):
        at = rng.randint(0, 4 + done)
        digits.insert(at, digits[at])
    return "".join(digits)


register(NoiseKey("passkey", "a five-digit key in noise", "pass key", _five_digits, 6))
register(NoiseKey("number_string", "ten digits in noise", "sequence of digits", _paired_digits, 12))
register(KeyValues("kv_retrieval", "one of many uuid pairs"))
register(CodeRun("code_run", "a call through up to ten functions"))
register(MathFind("math_find", "a rank statistic of a long list"))
register(MathCalc("math_calc", "every running value of a long sum"))
