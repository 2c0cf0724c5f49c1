from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer

from models.tasks import NOISE_SENTENCES, TEMPLATE_WORDS
from models.tokenizer import VOCAB_SIZE, build_tokenizer, pinned_words
from models.words import random_uuid, variable_name


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [tokenizer.decode([token]) for token in ids]


@pytest.mark.parametrize(
    "text",
    [
        " One of the special magic numbers for quizzical-harbor is: 7361942.",
        ' "ab12cd34-1a2b-ffff-0123-abcdef012345": "deadbeef-0000-1111-2222-333344445555",',
        "HTTPServer.añadir(€, 中文)\n\n\tif x:  # 100%\r\n",
        " VAR QJXKE = VAR ABCDE.",
        "",
    ],
)
def test_decoding_gives_back_every_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


def test_numbers_are_cut_into_groups_of_three(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, " 7361942") == [" ", "736", "194", "2"]
    for number in range(1000):
        assert len(pieces(tokenizer, f"{number:03d}")) == 1


def test_a_uuid_is_sixteen_pairs_and_four_dashes(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    for _ in range(50):
        uuid = random_uuid(rng)
        groups = uuid.split("-")
        expected = "-".join(groups).replace("-", "")
        found = pieces(tokenizer, f'"{uuid}"')[1:-1]
        assert [p for p in found if p != "-"] == [expected[i : i + 2] for i in range(0, 32, 2)]
        assert len(found) == 20


def test_a_variable_of_five_capitals_is_three_tokens(tokenizer: Tokenizer) -> None:
    rng = random.Random(4)
    for _ in range(50):
        name = variable_name(rng)
        assert pieces(tokenizer, f" {name}") == [f" {name[:2]}", name[2:4], name[4:]]


def test_pinned_and_template_words_are_single_tokens(tokenizer: Tokenizer) -> None:
    for word in pinned_words():
        assert pieces(tokenizer, f" {word}") == [f" {word}"]
        assert pieces(tokenizer, word) == [word]
    for word in ("magic", "special", "mentioned", "grass", "Remember"):
        assert word in TEMPLATE_WORDS
        assert pieces(tokenizer, f" {word}") == [f" {word}"]
    assert all(len(pieces(tokenizer, s)) <= 6 for s in NOISE_SENTENCES)


def test_the_tokenizer_is_complete_and_encodes_bos_first(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.encode("The").tokens[0] == "<|bos|>"


def test_building_again_pins_the_same_ids(tokenizer: Tokenizer) -> None:
    """Merges depend on the Python version's library text; specials and pinned tokens do not."""
    built = build_tokenizer()
    assert built.get_vocab_size() == VOCAB_SIZE
    for token in ("<|bos|>", "<|eos|>", "<|pad|>", "000", "99", "fe", "QX", "ĠVAR", "Ġmagic"):
        assert built.token_to_id(token) == tokenizer.token_to_id(token)
