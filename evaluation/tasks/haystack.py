"""The text that needles hide in.

* noise: RULER's five short sentences, over and over.
* essay: natural text, a file of the user (`--essay`), else the reference documentation and
  docstrings of Python's standard library, those parts that the demo model never saw in training
  (models/prose.py). A report says which. RULER uses Paul Graham's essays, which are not
  redistributable, so scores do not match the published ones; methods are compared with full
  attention on the same samples.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from longreach.errors import InvalidRequest
from models.prose import prose_text
from models.tasks import NOISE_SENTENCES

NOISE = "".join(NOISE_SENTENCES).strip()
"""RULER's noise: one unit of a noise haystack."""

_SENTENCE_WORDS_MAX = 40
_SENTENCES_MIN = 100


@dataclass(frozen=True)
class Essay:
    """Natural text as sentences; `name` says where it comes from."""

    name: str
    sentences: tuple[str, ...]

    def run(self, start: int, count: int) -> list[str]:
        """`count` sentences from sentence `start` on, around the end if need be."""
        total = len(self.sentences)
        return [self.sentences[(start + offset) % total] for offset in range(count)]

    def before(self, start: int) -> str:
        """Text that leads up to sentence `start`."""
        total = len(self.sentences)
        lead = [self.sentences[(start - back) % total] for back in range(8, 0, -1)]
        return " ".join(lead) + " "


@cache
def load_essay(path: Path | None) -> Essay:
    """The essay text of a file, or of the standard library.

    Raises InvalidRequest for a file that is not UTF-8 text or has fewer than 100 sentences.
    """
    if path is None:
        sentences = _sentences(prose_text(True))
        return Essay(
            f"documentation of CPython {platform.python_version()}, held-out part", sentences
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read the essay text {path}: {error}") from error
    sentences = _sentences(text)
    if len(sentences) < _SENTENCES_MIN:
        raise InvalidRequest(
            f"{path} has {len(sentences)} sentences; an essay haystack needs {_SENTENCES_MIN}: "
            "give a longer text"
        )
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    return Essay(f"{path.name} ({digest})", sentences)


def _sentences(text: str) -> tuple[str, ...]:
    """Sentences with single spaces, none longer than 40 words (tables of a text have no stops)."""
    pieces: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text).strip()):
        words = sentence.split(" ")
        starts = range(0, len(words), _SENTENCE_WORDS_MAX)
        pieces += [" ".join(words[at : at + _SENTENCE_WORDS_MAX]) for at in starts]
    return tuple(piece for piece in pieces if piece)


def place(sentences: Sequence[str], needles: Sequence[tuple[float, str]]) -> list[str]:
    """Sentences with each (depth, needle) inserted; depth 0 is the beginning, 1 the end.

    Needles of equal place keep the order given.
    """
    placed: list[str] = []
    ordered = sorted(
        ((int(depth * len(sentences)), order, text) for order, (depth, text) in enumerate(needles)),
    )
    done = 0
    for index, _, text in ordered:
        placed += sentences[done:index]
        placed.append(text)
        done = index
    return placed + list(sentences[done:])
