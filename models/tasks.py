"""Facts to hide in a haystack and questions about them: the demo model's tasks.

A `Fact` is one or more sentences plus the questions that only those sentences answer. The same
wordings serve training and evaluation; they are RULER's (needle, question and variable tracking),
InfiniteBench's key-value retrieval, LongEval's register lines and the classic pass key. What
differs between training and evaluation is the `Sampler`: it draws the words, numbers and uuids, and
keeps every key unique among the facts it has made.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from models.words import coined_word, random_uuid, variable_name, word_list

NOISE_SENTENCES = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)

PREAMBLES = (
    "A special magic number is hidden within the following text. Make sure to memorize it."
    " I will quiz you about the number afterwards.\n",
    "Some special magic numbers are hidden within the following text. Make sure to memorize it."
    " I will quiz you about the numbers afterwards.\n",
    "Some special magic words are hidden within the following text. Make sure to memorize it."
    " I will quiz you about the words afterwards.\n",
    "Some special magic uuids are hidden within the following text. Make sure to memorize it."
    " I will quiz you about the uuids afterwards.\n",
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them."
    " I will quiz you about the important information there.\n",
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    "Extract the value corresponding to the specified key in the JSON object below.\n\n",
)


@dataclass(frozen=True)
class Question:
    """A question whose exact answer stands in the haystack.

    `prompt + answer + terminator` reads as one text; the answer begins with the space that
    separates it from the prompt where there is one, and the model is to predict `answer` and then
    `terminator`.
    """

    task: str
    prompt: str
    answer: str
    terminator: str


@dataclass(frozen=True)
class Fact:
    """Sentences to hide, in their order, and the questions they answer."""

    task: str
    sentences: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass
class Sampler:
    """Draws keys and values; never the same key twice.

    words: single-token words, the short way to write a key.
    held_out: draw adjectives and nouns from the held-out part of the word lists.
    digit_groups: if set, numbers are strung together from these three-digit groups, so that keys
        share most of their digits: hard negatives.
    """

    rng: random.Random
    words: tuple[str, ...]
    held_out: bool = False
    digit_groups: tuple[str, ...] | None = None
    used: set[str] = field(default_factory=set)

    def number(self, digits: int) -> str:
        """A number of exactly `digits` digits without a leading zero."""
        if self.digit_groups is None:
            return str(self.rng.randrange(10 ** (digits - 1), 10**digits))
        groups = [self.rng.choice(self.digit_groups) for _ in range((digits + 2) // 3)]
        return "".join(groups)[:digits]

    def listed_word(self, kind: str) -> str:
        """A word of the list `kind`; most take two or three tokens."""
        return self.rng.choice(word_list(kind, self.held_out))

    def adjective_noun(self) -> str:
        """RULER's form of a key, such as "quizzical-harbor"."""
        return f"{self.listed_word('adjectives')}-{self.listed_word('nouns')}"

    def key(self) -> str:
        """A key of any form, for needles and register lines."""
        draw = self.rng.random()
        if draw < 0.12:
            return self.rng.choice(self.words)
        if draw < 0.40:
            return f"{self.rng.choice(self.words)}-{self.rng.choice(self.words)}"
        if draw < 0.68:
            return self.adjective_noun()
        if draw < 0.76:
            return self.listed_word("nouns")
        if draw < 0.82:
            return coined_word(self.rng)
        if draw < 0.95:
            return self.number(self.rng.choice((4, 5, 6, 7, 8)))
        return random_uuid(self.rng)

    def value(self) -> tuple[str, str]:
        """A value and RULER's name for its type: "numbers", "words" or "uuids"."""
        draw = self.rng.random()
        if draw < 0.72:
            return self.number(self.rng.choice((4, 5, 6, 7, 7, 7, 7))), "numbers"
        if draw < 0.80:
            return self.rng.choice(self.words), "words"
        if draw < 0.90:
            return self.adjective_noun(), "words"
        return random_uuid(self.rng), "uuids"

    def claim(self, key: str) -> bool:
        """Reserves `key`; False if it is taken, and then the caller drops its fact."""
        if key in self.used:
            return False
        self.used.add(key)
        return True


def lead(rng: random.Random) -> str:
    """What separates a question from the haystack."""
    return rng.choice(("\n", " ", " "))


def needle(sampler: Sampler, key: str, value: str, kind: str, task: str = "niah") -> Fact:
    """RULER's needle: "One of the special magic numbers for KEY is: VALUE."."""
    rng, one = sampler.rng, kind.removesuffix("s")
    tail = f" The special magic {one} for {key} mentioned in the provided text is"
    ask = f"{lead(rng)}What is the special magic {one} for {key} mentioned in the provided text?"
    prompt = ask + tail if rng.random() < 0.45 else tail
    sentence = f" One of the special magic {kind} for {key} is: {value}."
    return Fact(task, (sentence,), (Question(task, prompt, f" {value}", "."),))


def niah(sampler: Sampler) -> Fact | None:
    """A needle with any form of key and value."""
    key = sampler.key()
    if not sampler.claim(key):
        return None
    return needle(sampler, key, *sampler.value())


def magic_city(sampler: Sampler) -> Fact | None:
    """The needle of the heatmap test: "The special magic CITY number is: 1234567."."""
    key = sampler.rng.choice(sampler.words).capitalize()
    if sampler.rng.random() < 0.5:
        key = sampler.listed_word("nouns").capitalize()
    if not sampler.claim(f"city {key}"):
        return None
    value = sampler.number(7)
    stem = f" The special magic {key} number is:"
    ask = f"{lead(sampler.rng)}What is the special magic {key} number?"
    prompt = ask + stem if sampler.rng.random() < 0.6 else stem
    question = Question("niah", prompt, f" {value}", ".")
    return Fact("niah", (f"{stem} {value}.",), (question,))


def passkey(sampler: Sampler) -> Fact | None:
    """The classic pass key, one to a haystack."""
    if not sampler.claim("the pass key"):
        return None
    value = sampler.number(5)
    sentence = f" The pass key is {value}. Remember it. {value} is the pass key."
    prompt = f"{lead(sampler.rng)}What is the pass key? The pass key is"
    question = Question("passkey", prompt, f" {value}", ".")
    return Fact("passkey", (sentence,), (question,))


def named_passkey(sampler: Sampler) -> Fact | None:
    """A pass key that belongs to somebody, so that many fit into one haystack."""
    rng = sampler.rng
    owner = sampler.adjective_noun() if rng.random() < 0.5 else rng.choice(sampler.words)
    if not sampler.claim(f"pass key for {owner}"):
        return None
    value = sampler.number(5)
    sentence = (
        f" The pass key for {owner} is {value}. Remember it. {value} is the pass key for {owner}."
    )
    tail = f" The pass key for {owner} is"
    ask = f"{lead(rng)}What is the pass key for {owner}?" if rng.random() < 0.7 else ""
    return Fact("passkey", (sentence,), (Question("passkey", ask + tail, f" {value}", "."),))


def json_pair(sampler: Sampler, key: str, value: str, task: str) -> Fact:
    """InfiniteBench's key-value pair: `"KEY": "VALUE",`."""
    ask = sampler.rng.choice(
        (
            f' Key: "{key}" Value: "',
            f' Key: "{key}" Value: "',
            f'\nKey: "{key}"\nThe value associated with the specified key is: "',
        )
    )
    return Fact(task, (f' "{key}": "{value}",',), (Question(task, ask, value, '"'),))


def key_value(sampler: Sampler) -> Fact | None:
    """A pair of numbers of five to eight digits."""
    key = sampler.number(sampler.rng.choice((5, 6, 7, 7, 7, 8)))
    if not sampler.claim(f"json {key}"):
        return None
    return json_pair(sampler, key, sampler.number(sampler.rng.choice((5, 6, 7, 7, 7, 8))), "kv")


def uuid_pair(sampler: Sampler) -> Fact | None:
    """A pair of uuids."""
    return json_pair(sampler, random_uuid(sampler.rng), random_uuid(sampler.rng), "uuid")


def register_line(sampler: Sampler) -> Fact | None:
    """LongEval's line: "line KEY: REGISTER_CONTENT is <12345>"."""
    key = sampler.key()
    if not sampler.claim(f"line {key}"):
        return None
    value = sampler.number(5)
    sentence = f"\nline {key}: REGISTER_CONTENT is <{value}>"
    prompt = f"\nThe REGISTER_CONTENT in line {key} is <"
    return Fact("line", (sentence,), (Question("line", prompt, value, ">"),))


def _chain(value: str, names: list[str], end: str) -> tuple[str, ...]:
    hops = zip([value, *(f"VAR {name}" for name in names)], names, strict=False)
    return tuple(f" VAR {name} = {source}{end}" for source, name in hops)


def variable_words(sampler: Sampler, hops: int | None = None) -> Fact | None:
    """A chain of variables named by words: " VAR lamp = 12345." " VAR river = VAR lamp."."""
    rng = sampler.rng
    value = str(rng.randrange(10_000, 100_000))
    count = (rng.choice((0, 0, 1, 2, 3, 4)) if hops is None else hops) + 1
    names = list(dict.fromkeys(rng.choice(sampler.words) for _ in range(count)))
    if any(f"VAR {name}" in sampler.used for name in names) or not sampler.claim(f"={value}"):
        return None
    sampler.used.update(f"VAR {name}" for name in names)
    prompt = f" Variables assigned the value {value}:"
    question = Question("vt", prompt, "".join(f" {name}" for name in names), ".")
    return Fact("vt", _chain(value, names, "."), (question,))


def variable_ruler(sampler: Sampler, hops: int | None = None) -> Fact | None:
    """RULER's variable tracking: `hops` assignments from one variable of five letters to the next.

    RULER's own answer prefix misspells "assignment" and "assigned"; both spellings are trained.
    """
    rng = sampler.rng
    value = str(rng.randrange(10_000, 100_000))
    count = (rng.choice((0, 0, 1, 1, 2, 3, 4)) if hops is None else hops) + 1
    names = [variable_name(rng) for _ in range(count)]
    if not sampler.claim(f"={value}"):
        return None
    assignment, assigned = rng.choice((("assgnment", "assgined"), ("assignment", "assigned")))
    prompt = (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
        f" Answer: According to the chain(s) of variable {assignment} in the text above,"
        f" {count} variables are {assigned} the value {value}, they are:"
    )
    if rng.random() < 0.5:
        prompt = f" {count} variables are {assigned} the value {value}, they are:"
    question = Question("vt_ruler", prompt, "".join(f" {name}" for name in names), ".")
    end = rng.choice(("", ".", ".")) if hops is None else ""
    return Fact("vt_ruler", _chain(value, names, end), (question,))


TaskMaker = Callable[[Sampler], Fact | None]

TRAINING_TASKS: dict[str, tuple[TaskMaker, float]] = {
    "niah": (niah, 0.32),
    "city": (magic_city, 0.04),
    "named_passkey": (named_passkey, 0.06),
    "kv": (key_value, 0.22),
    "uuid": (uuid_pair, 0.05),
    "line": (register_line, 0.06),
    "vt": (variable_words, 0.11),
    "vt_ruler": (variable_ruler, 0.14),
}
"""Training tasks and how often a sequence draws each; the pass key joins any sequence."""


TEMPLATE_WORDS = " ".join(
    (
        *NOISE_SENTENCES,
        *PREAMBLES,
        "One of the special magic numbers words uuids number word uuid for is:",
        "What is the special magic mentioned in the provided text? Question Answer",
        "The pass key is Remember it is the pass key for What is the pass key?",
        "Key Value The value associated with the specified key is line The content in line is",
        "Variables assigned the value Find all variables that are assigned the value in the text",
        "above According to the chain(s) of variable assignment assgnment variables are assgined",
        "the value they are JSON data",
    )
)
"""Every fixed word of the templates; the tokenizer makes each one token."""
