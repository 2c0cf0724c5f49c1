"""Tokenizers of three kinds: the demo model's, one token per byte, and words with a BOS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import WordPiece
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from evaluation.encoding import Encoder
from evaluation.tasks.base import Sources
from tests.tiny_models import save_byte_tokenizer

DEMO = Path(__file__).parents[3] / "models" / "demo"
ENCODERS = ("demo", "bytes", "pieces")


@pytest.fixture(scope="session")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Encoder]:
    made: dict[str, Encoder] = {}

    def get(kind: str) -> Encoder:
        if kind not in made:
            made[kind] = Encoder(_tokenizer(kind, tmp_path_factory.mktemp(kind)), kind)
        return made[kind]

    return get


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest, encoder_of: Callable[[str], Encoder]) -> Encoder:
    return encoder_of(request.param)


@pytest.fixture
def byte_encoder(encoder_of: Callable[[str], Encoder]) -> Encoder:
    return encoder_of("bytes")


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """An essay of a user: numbered sentences, so that every one is unlike the others."""
    path = tmp_path_factory.mktemp("essay") / "essay.txt"
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    text = " ".join(
        f"Chapter {a} tells of {b} and {c}." for a in numbers for b in numbers for c in numbers
    )
    path.write_text(text, encoding="utf-8")
    return Sources(essay=path)


def _tokenizer(kind: str, directory: Path) -> PreTrainedTokenizerFast:
    if kind == "demo":
        return AutoTokenizer.from_pretrained(DEMO)
    if kind == "bytes":
        save_byte_tokenizer(directory)
        return AutoTokenizer.from_pretrained(directory)
    return _pieces()


def _pieces() -> PreTrainedTokenizerFast:
    """WordPiece of single letters within words, [CLS] in front and [SEP] behind, spaces lost."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    tokens += ["The", "grass", "magic", "number", "special", "is"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = WordPiece()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
