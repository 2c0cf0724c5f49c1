"""Builds the demo model's tokenizer: byte-level BPE whose vocabulary suits retrieval tasks.

A tiny model copies short spellings more reliably than long ones, so the strings that questions
ask for are cut into few, regular tokens:

* digits in groups of up to three, each group one token (`7361942` -> `736 194 2`);
* a uuid in pairs of hexadecimal digits, joined by dashes;
* words in capitals in pairs of letters (` QJXKE` -> ` QJ XK E`), except the fixed words of the
  templates: the first token of a variable's name tells it from 675 others;
* the fixed words of the templates and some hundred adjectives and nouns: one token each.

Any other text is spelt by ordinary BPE merges learnt from the training part of `prose.py` and of
`words.py`. Decoding is byte-exact for every input.
"""

from __future__ import annotations

import json
import re
from itertools import product

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.prose import prose_text, source_text
from models.tasks import TEMPLATE_WORDS
from models.words import word_list

VOCAB_SIZE = 5760
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2

_PINNED_CAPITALS = ("VAR", "REGISTER_CONTENT")
_PINNED_ADJECTIVES = 120
_PINNED_NOUNS = 150
_HEX = "[0-9a-f]"


def _uuid_pair_pattern() -> str:
    """Matches two hexadecimal digits inside a uuid, told from other text by look-around."""
    first_groups = f"{_HEX}{{2}}(?={_HEX}{{0,6}}-(?:{_HEX}{{4}}-|{_HEX}{{12}}(?![0-9A-Za-z])))"
    # Look-behind must have a fixed length, so the last group's six pairs are spelt out one by one.
    last_group = [
        f"(?<=-{_HEX}{{4}}-{_HEX}{{{done}}}){_HEX}{{2}}(?={_HEX}{{{10 - done}}}(?![0-9A-Za-z]))"
        for done in range(0, 12, 2)
    ]
    return "|".join([first_groups, *last_group])


def _split_pattern() -> str:
    pinned = "|".join(_PINNED_CAPITALS)
    capitals = "[A-Z]{2,}(?![A-Za-z])"
    rest_in_capitals = "(?=[A-Z]*(?![A-Za-z]))"
    uuid_start = f"{_HEX}{{8}}-{_HEX}{{4}}-"
    return "|".join(
        (
            f" ?(?:{pinned})(?![A-Za-z])",
            _uuid_pair_pattern(),
            r"\p{N}{1,3}",
            f"(?: |(?<![A-Za-z]))[A-Z]{{2}}{rest_in_capitals}",
            f"(?<=[A-Z]{{2}})[A-Z]{{1,2}}{rest_in_capitals}",
            f" ?(?!{capitals}|{uuid_start})\\p{{L}}+",
            r" ?[^\s\p{L}\p{N}]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )


def _spread(words: tuple[str, ...], count: int) -> list[str]:
    """`count` words of at most eight letters, spread evenly over the sorted list."""
    short = [word for word in words if len(word) <= 8]
    return [short[i * len(short) // count] for i in range(count)]


def pinned_words() -> list[str]:
    """Words that are one token both after a space and without one."""
    words = _spread(word_list("adjectives", False), _PINNED_ADJECTIVES)
    words += _spread(word_list("nouns", False), _PINNED_NOUNS)
    return sorted(set(words))


def _pinned_tokens() -> list[str]:
    """Every string that must be one token, in the byte-level alphabet (a space is `Ġ`)."""
    digits = [f"{n:0{width}d}" for width in (2, 3) for n in range(10**width)]
    hexadecimal = ["".join(pair) for pair in product("0123456789abcdef", repeat=2)]
    capitals = ["".join(pair) for pair in product("ABCDEFGHIJKLMNOPQRSTUVWXYZ", repeat=2)]
    words = pinned_words() + list(_PINNED_CAPITALS)
    words += sorted(set(re.findall(r"[A-Za-z]+", TEMPLATE_WORDS)))
    spaced = [f"Ġ{word}" for word in words + capitals]
    return list(dict.fromkeys(digits + hexadecimal + capitals + words + spaced))


def build_tokenizer() -> Tokenizer:
    """The tokenizer, built from the training text only; the same on every run of one Python.

    Returns a `tokenizers.Tokenizer` with `VOCAB_SIZE` entries. It adds no special tokens by
    itself: a prompt begins with `BOS` because the caller writes it.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_split_pattern()), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    for token in _pinned_tokens():
        vocab.setdefault(token, len(vocab))

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    learner.train_from_iterator(
        _learning_corpus(),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            initial_alphabet=alphabet,
            show_progress=False,
            min_frequency=2,
            max_token_length=12,
        ),
    )
    merges: list[tuple[str, str]] = []
    for left, right in _learnt_merges(learner):
        # A merge is usable only if its parts exist; they do, because merges come in learnt order.
        if len(vocab) < VOCAB_SIZE or left + right in vocab:
            vocab.setdefault(left + right, len(vocab))
            if left in vocab and right in vocab:
                merges.append((left, right))

    # ignore_merges: a piece that is in the vocabulary is one token whether merges reach it or not.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _learning_corpus() -> list[str]:
    prose = prose_text(False)
    words = word_list("adjectives", False) + word_list("nouns", False)
    return [prose, source_text(False)[: len(prose) // 2]] + [f" {w} {w}-{w}" for w in words] * 10


def _learnt_merges(learner: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]
