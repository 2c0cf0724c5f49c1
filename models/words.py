"""Word lists for keys and values, split into a training part and a held-out part.

`wordlists/` holds the adjectives and nouns of the wonderwords package (MIT), the lists that RULER
draws its `adjective-noun` keys from. Every fourth word, by a hash of its spelling, is held out:
training never sees it, evaluation uses only such words.
"""

from __future__ import annotations

import random
import zlib
from functools import cache
from pathlib import Path

_WORDLISTS = Path(__file__).parent / "wordlists"
_CONSONANTS = "bcdfghjklmnprstvwz"
_VOWELS = "aeiou"


def is_held_out(name: str, one_in: int = 4) -> bool:
    """Whether `name` belongs to the evaluation part: a fixed one in `one_in`, by CRC-32."""
    return zlib.crc32(name.encode()) % one_in == 0


@cache
def word_list(name: str, held_out: bool) -> tuple[str, ...]:
    """The training or held-out part of the list `name` ("adjectives" or "nouns"), sorted."""
    words = (_WORDLISTS / f"{name}.txt").read_text(encoding="ascii").split()
    return tuple(word for word in words if is_held_out(word) == held_out)


def coined_word(rng: random.Random) -> str:
    """A pronounceable word that is in no list, two or three syllables, such as "zoramel"."""
    syllables = [
        rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.choice((2, 2, 3)))
    ]
    return "".join(syllables) + rng.choice(_CONSONANTS)


def variable_name(rng: random.Random) -> str:
    """Five random capital letters: a variable of RULER's variable tracking."""
    return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5))


def random_uuid(rng: random.Random) -> str:
    """A random uuid in its usual 8-4-4-4-12 form, lower case."""
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
