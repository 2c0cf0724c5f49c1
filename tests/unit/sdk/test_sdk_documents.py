"""Documents in pieces, and requests checked before they are sent."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.errors import InvalidRequest
from longreach.sdk import documents, messages
from longreach.sdk.options import GenerateKeywords, GenerateOptions


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=50), max_size=4),
    st.integers(1, 40_000),
)
def test_pieces_join_to_the_text_and_fit_a_message(parts: list[str], repeats: int) -> None:
    parts = [part * repeats for part in parts]
    pieces = list(documents.text_pieces(parts))
    assert "".join(pieces) == "".join(parts)
    assert all(len(piece.encode()) <= documents.PIECE_BYTES_MAX for piece in pieces)


def test_a_piece_of_four_byte_characters_still_fits() -> None:
    pieces = list(documents.text_pieces("𝔏" * 600_000))
    assert max(len(piece.encode()) for piece in pieces) <= documents.PIECE_BYTES_MAX
    assert sum(map(len, pieces)) == 600_000


def test_a_lone_surrogate_is_named_by_its_place_in_the_whole_text() -> None:
    with pytest.raises(InvalidRequest, match="character 8"):
        list(documents.text_pieces(["hello ", "it\udc80s"]))


def test_bytes_are_not_taken_for_text() -> None:
    with pytest.raises(InvalidRequest, match="is bytes, not str"):
        list(documents.text_pieces([b"hello"]))  # type: ignore[list-item]


@pytest.mark.parametrize("shift", range(4))
def test_characters_split_by_a_read_of_the_file_arrive_whole(tmp_path: Path, shift: int) -> None:
    text = "x" * shift + "𝔏" * 300_000
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    assert "".join(documents.file_pieces(path)) == text


def test_line_endings_of_a_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"one\r\ntwo\r")
    assert "".join(documents.file_pieces(path)) == "one\r\ntwo\r"


@pytest.mark.parametrize(
    ("content", "byte"),
    [
        (b"\xff", 0),
        (b"a" * 700_000 + b"\xff" + b"a", 700_000),
        (
            b"a" * (documents.PIECE_BYTES_MAX // 2 - 1) + b"\xc3(",
            documents.PIECE_BYTES_MAX // 2 - 1,
        ),
        (b"cut off \xe2\x82", 8),
    ],
)
def test_the_first_byte_that_is_not_utf8_is_named(
    tmp_path: Path, content: bytes, byte: int
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=f"at byte {byte} "):
        list(documents.file_pieces(path))


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_out_of_range_is_named_with_its_index(token: int) -> None:
    with pytest.raises(InvalidRequest, match=f"token id {token} at index 70000"):
        list(documents.token_pieces([*range(70_000), token]))


@pytest.mark.parametrize("given", [{}, {"text": "x", "tokens": [1]}, {"tokens": [1], "path": "x"}])
def test_a_context_has_exactly_one_source(given: dict[str, Any]) -> None:
    arguments = {"text": None, "tokens": None, "path": None, **given}
    with pytest.raises(InvalidRequest, match="exactly one of text, tokens and path"):
        messages.create_requests(name="", model="", placement="", **arguments)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 2**32),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("seed", 2**64),
        ("min_coverage", 1.01),
    ],
)
def test_an_option_out_of_range_is_named_with_its_limits(option: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"{option} is {value}.*must be in"):
        messages.generate_request("hi", GenerateOptions(**{option: value}))  # type: ignore[arg-type]


def test_a_budget_that_is_none_teaches_how_to_write_one() -> None:
    with pytest.raises(InvalidRequest, match="write exact, top_k=100"):
        messages.generate_request("hi", GenerateOptions(budget="a hundred"))


def test_the_keywords_are_the_fields_of_the_options() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(GenerateOptions)}
    keywords = {name: kind.__forward_arg__ for name, kind in _annotations().items()}
    assert keywords == fields


def _annotations() -> dict[str, Any]:
    return GenerateKeywords.__annotations__
