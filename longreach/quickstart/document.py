"""A long document of real text, with facts hidden in it.

The text is Python's own documentation, which every machine that runs this has: help topics and
docstrings of the part of the standard library that the demo model was not trained on
(`models.words.is_held_out`). The same Python version gives the same document.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from longreach.errors import InvalidRequest

_PARAGRAPH = "\n\n"
_HELD_OUT_ONE_IN = 3


@dataclass(frozen=True, slots=True)
class HiddenFact:
    """A sentence in the document, the question that it answers, and the answer.

    `depth` is where it stands, as a share of the document. The answer is known to this tour only;
    the cluster sees the document and the question.
    """

    sentence: str
    question: str
    answer: str
    depth: float


FACTS = (
    HiddenFact(
        sentence=" One of the special magic numbers for violet-harbor is: 7361942.",
        question=(
            " What is the special magic number for violet-harbor mentioned in the provided text?"
            " The special magic number for violet-harbor mentioned in the provided text is"
        ),
        answer="7361942",
        depth=0.47,
    ),
    HiddenFact(
        sentence=" The pass key is 52817. Remember it. 52817 is the pass key.",
        question=" What is the pass key? The pass key is",
        answer="52817",
        depth=0.12,
    ),
    HiddenFact(
        sentence=" One of the special magic numbers for copper-lantern is: 4829163.",
        question=(
            " What is the special magic number for copper-lantern mentioned in the provided text?"
            " The special magic number for copper-lantern mentioned in the provided text is"
        ),
        answer="4829163",
        depth=0.83,
    ),
)
"""What the tour asks, in this order. The sentences have the forms of `models.tasks`."""

DISTRACTORS = (
    (0.30, " One of the special magic numbers for violet-meadow is: 9024417."),
    (0.40, " One of the special magic numbers for golden-lantern is: 8306291."),
    (0.65, " One of the special magic numbers for copper-harbor is: 1573806."),
)
"""Depths and sentences that resemble the facts but answer none of the questions."""


@dataclass(frozen=True, slots=True)
class Document:
    """The text, how many tokens it has for the model's tokenizer, and where it comes from."""

    text: str
    tokens: int
    source: str


def build_document(tokenizer_path: Path, tokens_min: int) -> Document:
    """At least `tokens_min` tokens of held-out standard-library text with the facts in it.

    Raises InvalidRequest when this Python has too little of it, or without a tokenizer.
    """
    if not tokenizer_path.exists():
        raise InvalidRequest(
            f"there is no {tokenizer_path}; name a model directory that has one with --model"
        )
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    text, source = "", ""
    for source, part in _texts():
        text = text + _PARAGRAPH + part if text else part
        cut = _cut(text, tokenizer, tokens_min)
        if cut is not None:
            hidden = [(fact.depth, fact.sentence) for fact in FACTS]
            full = hide(cut, [*hidden, *DISTRACTORS])
            return Document(full, len(tokenizer.encode(full).ids), source)
    raise InvalidRequest(
        f"this Python's standard library has fewer than {tokens_min} tokens of text that the demo "
        "model was not trained on; ask for less with --document-tokens"
    )


def _cut(text: str, tokenizer: Tokenizer, tokens_min: int) -> str | None:
    """Whole paragraphs of at least `tokens_min` tokens from the start; None if there are fewer."""
    offsets = tokenizer.encode(text).offsets
    if len(offsets) <= tokens_min:
        return None
    stop = text.find(_PARAGRAPH, offsets[tokens_min][0])
    return text if stop < 0 else text[:stop]


def hide(text: str, sentences: list[tuple[float, str]]) -> str:
    """Puts each sentence at the end of the paragraph at its depth (a share of the characters)."""
    placed = []
    for depth, sentence in sentences:
        at = text.find(_PARAGRAPH, int(depth * len(text)))
        placed.append((len(text) if at < 0 else at, sentence))
    for at, sentence in sorted(placed, reverse=True):
        text = text[:at] + sentence + text[at:]
    return text


def _texts() -> Iterator[tuple[str, str]]:
    """Texts in the order of preference, each with what the document consists of once it is in."""
    try:
        from models.prose import prose_text, source_text
    except ImportError as error:
        yield f"standard library sources ({error}; no documentation text)", _library_sources()
        return
    version = ".".join(map(str, sys.version_info[:3]))
    name = f"documentation of Python {version}'s standard library"
    yield name, prose_text(held_out=True)
    yield f"{name}, and sources, as the documentation is short here", source_text(held_out=True)


def _library_sources() -> str:
    """Sources of the standard library's held-out modules, for a Python without help topics."""
    from models.words import is_held_out

    library = Path(os.__file__).parent
    return _PARAGRAPH.join(
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(library.glob("*.py"))
        if is_held_out(path.stem, _HELD_OUT_ONE_IN)
    )
