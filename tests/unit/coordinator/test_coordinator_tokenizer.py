"""Text in, text out: incremental detokenisation, stop texts, special tokens."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from coordinator.stop_texts import StopTexts
from coordinator.tokenizer import REPLACEMENT, Detokenizer, Tokenizer
from longreach.errors import FailedPrecondition

TEXTS = [  # every kind of character, one to four bytes long
    "Grüße aus Zürich",
    "naïve café",
    "日本語のテキスト",
    "🙂🙃 family: 👩‍👩‍👧",
    "plain words, twice",
]


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE (GPT-2, Llama 3, Qwen style) whose merges cut through characters."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    return core


def byte_fallback() -> tokenizers.Tokenizer:
    """A word-piece vocabulary with byte fallback (Llama 2, Gemma style): spaces are "▁"."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁the"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a")]
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    core.add_special_tokens(["<s>", "</s>"])
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return core


BYTE_LEVEL = byte_level()
BYTE_FALLBACK = byte_fallback()


def _pushed(tokenizer, ids, prompt=()):
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.push(i) for i in ids], detokenizer.flush()


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=60))
def test_pieces_of_random_ids_join_to_the_full_decode(ids):
    tokenizer = Tokenizer(BYTE_LEVEL)
    pieces, rest = _pushed(tokenizer, ids)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=30),
    cut=st.integers(0, 30),
)
def test_pieces_after_a_prompt_continue_it(ids, cut):
    tokenizer = Tokenizer(BYTE_LEVEL)
    pieces, rest = _pushed(tokenizer, ids[cut:], ids[:cut])
    whole = tokenizer.decode(ids)
    emitted = "".join(pieces) + rest
    assert whole.endswith(emitted)
    before = tokenizer.decode(ids[:cut]).rstrip(REPLACEMENT)
    assert len(emitted) <= len(whole) - len(before)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40))
@pytest.mark.parametrize("core", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
def test_no_piece_of_a_real_text_holds_half_a_character(core, text):
    tokenizer = Tokenizer(core)
    text = text.replace(REPLACEMENT, "")
    ids = tokenizer.encode(text, starts=False)
    pieces, rest = _pushed(tokenizer, ids)
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + rest == tokenizer.decode(ids)


def test_a_character_is_emitted_with_its_last_token():
    tokenizer = Tokenizer(BYTE_FALLBACK)
    ids = [BYTE_FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    pieces, rest = _pushed(tokenizer, [*ids, BYTE_FALLBACK.token_to_id("a")])
    assert pieces == ["", "", "", "🙂", "a"]
    assert rest == ""


def test_an_unfinished_character_comes_out_at_the_end_only():
    tokenizer = Tokenizer(BYTE_FALLBACK)
    ids = [BYTE_FALLBACK.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()[:2]]
    pieces, rest = _pushed(tokenizer, ids)
    assert pieces == ["", ""]
    assert set(rest) == {REPLACEMENT}


def test_a_word_after_the_prompt_keeps_its_space():
    tokenizer = Tokenizer(BYTE_FALLBACK)
    the = BYTE_FALLBACK.token_to_id("▁the")
    pieces, _ = _pushed(tokenizer, [the, the], prompt=[the])
    assert pieces == [" the", " the"]


def test_special_tokens_read_as_nothing_and_cost_no_context():
    tokenizer = Tokenizer(BYTE_FALLBACK)
    the, end = BYTE_FALLBACK.token_to_id("▁the"), BYTE_FALLBACK.token_to_id("</s>")
    pieces, rest = _pushed(tokenizer, [the, *[end] * 500, the])
    assert "".join(pieces) + rest == "the the"


def test_noise_that_never_becomes_a_character_is_not_held_forever():
    tokenizer = Tokenizer(BYTE_LEVEL)
    noise = BYTE_LEVEL.token_to_id(pre_byte(0xFF))
    pieces, rest = _pushed(tokenizer, [noise] * 1000)
    assert len("".join(pieces)) > 900
    assert "".join(pieces) + rest == tokenizer.decode([noise] * 1000)


def pre_byte(byte: int) -> str:
    """The byte-level alphabet's letter for a byte that no text of the trainer contains."""
    letters = {c for word in TEXTS for c in word}
    known = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert byte == 0xFF
    assert "ÿ" in known
    assert "ÿ" not in letters
    return "ÿ"


def test_a_text_that_starts_gets_the_beginning_token_and_no_end():
    core = byte_level()
    bos, eos = core.token_to_id("<s>"), core.token_to_id("</s>")
    plain = core.encode("naïve", add_special_tokens=False).ids
    assert Tokenizer(core).encode("naïve", starts=True) == plain
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert Tokenizer(core).encode("naïve", starts=True) == [bos, *plain]
    assert Tokenizer(core).encode("naïve", starts=False) == plain
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    assert Tokenizer(core).encode("naïve", starts=True) == [bos, *plain]
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", eos)]
    )
    config = {"eos_token": {"content": "</s>"}}
    assert Tokenizer(core, config).encode("naïve", starts=True) == plain


def test_the_beginning_token_may_come_from_the_tokenizer_config(tmp_path):
    core = byte_level()
    core.save(str(tmp_path / "tokenizer.json"))
    config = {"add_bos_token": True, "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.encode("naïve", starts=True)[0] == core.token_to_id("<s>")


def test_a_folder_without_a_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(FailedPrecondition, match=r"send token ids instead"):
        Tokenizer.load(str(tmp_path))


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="ab", max_size=40),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    data=st.data(),
)
def test_stop_texts_cut_where_the_first_one_begins_however_the_text_arrives(text, stops, data):
    stop = StopTexts(stops)
    emitted, at = "", 0
    while at < len(text) and stop.found is None:
        size = data.draw(st.integers(1, 5))
        emitted += stop.push(text[at : at + size])
        at += size
        assert not any(each in emitted for each in stops)
    if stop.found is None:
        assert not any(each in text for each in stops)
        assert emitted + stop.flush() == text
    else:
        seen = text[:at]
        first = min(seen.find(each) for each in stops if each in seen)
        assert emitted == seen[:first]


def test_text_that_cannot_begin_a_stop_text_is_not_held_back():
    stop = StopTexts(["\n\nUser:"])
    assert stop.push("words\n") == "words"
    assert stop.push("more") == "\nmore"
