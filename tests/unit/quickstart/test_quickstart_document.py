"""The tour's document: real text, long enough, the same every time, with the facts in it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from longreach.errors import InvalidRequest
from longreach.quickstart.document import DISTRACTORS, FACTS, Document, build_document, hide
from models.prose import prose_text
from models.tasks import Sampler, needle, passkey
from tests.tiny_models import save_byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(directory)
    return directory / "tokenizer.json"


@pytest.fixture(scope="module")
def document(tokenizer_path: Path) -> Document:
    return build_document(tokenizer_path, 50_000)


def test_the_document_has_the_tokens_asked_for_and_is_the_same_every_time(
    document: Document, tokenizer_path: Path
) -> None:
    assert 50_000 < document.tokens < 56_000
    assert document.tokens == len(document.text.encode())
    assert build_document(tokenizer_path, 50_000) == document


def test_every_fact_stands_once_at_its_depth_in_text_the_model_was_not_trained_on(
    document: Document,
) -> None:
    rest = document.text
    for sentence in [fact.sentence for fact in FACTS] + [text for _, text in DISTRACTORS]:
        assert rest.count(sentence) == 1
        rest = rest.replace(sentence, "")
    assert prose_text(held_out=True).startswith(rest)
    assert rest[:2000] not in prose_text(held_out=False)
    for fact in FACTS:
        depth = document.text.index(fact.sentence) / len(document.text)
        assert depth == pytest.approx(fact.depth, abs=0.05)


def test_answers_stand_in_the_document_but_not_in_any_question(document: Document) -> None:
    for fact in FACTS:
        assert fact.answer in document.text
        assert all(fact.answer not in other.question for other in FACTS)


def test_sentences_and_questions_have_the_forms_that_the_demo_model_knows() -> None:
    sampler = Sampler(random.Random(0), words=("harbor",))
    needle_forms = [needle(sampler, "KEY", "VALUE", "numbers") for _ in range(20)]
    sentences = {form.sentences[0] for form in needle_forms}
    questions = {form.questions[0].prompt for form in needle_forms}
    for fact, key in ((FACTS[0], "violet-harbor"), (FACTS[2], "copper-lantern")):
        assert fact.sentence.replace(key, "KEY").replace(fact.answer, "VALUE") in sentences
        assert fact.question.replace(key, "KEY") in questions
    known = passkey(sampler)
    assert known is not None
    value = known.questions[0].answer.strip()
    assert FACTS[1].sentence == known.sentences[0].replace(value, FACTS[1].answer)
    assert FACTS[1].question == known.questions[0].prompt


def test_sentences_go_to_the_ends_of_paragraphs_in_the_order_of_their_depths() -> None:
    text = "one.\n\ntwo.\n\nthree."
    assert hide(text, [(0.9, " C."), (0.0, " A."), (0.4, " B.")]) == (
        "one. A.\n\ntwo. B.\n\nthree. C."
    )


def test_too_little_text_is_said_with_the_way_out(tokenizer_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="--document-tokens"):
        build_document(tokenizer_path, 100_000_000)


def test_a_model_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="there is no"):
        build_document(tmp_path / "tokenizer.json", 10)
