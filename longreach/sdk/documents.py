"""Long documents as pieces small enough for one message, checked before they are sent."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from longreach.errors import InvalidRequest

PIECE_BYTES_MAX = 1 << 20
"""Longest piece of text in one message, bytes of UTF-8."""

PIECE_TOKENS_MAX = 1 << 16
"""Most token ids in one message."""

_TOKEN_ID_LIMIT = 1 << 32
# A character takes up to four bytes, so this many characters always fit one piece.
_PIECE_CHARS = PIECE_BYTES_MAX // 4


def text_pieces(text: str | Iterable[str]) -> Iterator[str]:
    """Cuts a text, or texts that belong together, into pieces of at most PIECE_BYTES_MAX bytes.

    Raises InvalidRequest where a part is not a string or has no UTF-8 form (a lone surrogate).
    """
    offset = 0
    for part in (text,) if isinstance(text, str) else text:
        if not isinstance(part, str):
            raise InvalidRequest(
                f"a piece of the text is {type(part).__name__}, not str; decode bytes first, or "
                "pass path= for a file"
            )
        for start in range(0, len(part), _PIECE_CHARS):
            piece = part[start : start + _PIECE_CHARS]
            _require_utf8(piece, offset)
            offset += len(piece)
            yield piece


def file_pieces(path: str | os.PathLike[str]) -> Iterator[str]:
    """Reads a UTF-8 text file piece by piece; its bytes arrive unchanged, a leading BOM aside.

    Raises InvalidRequest naming the byte where the file stops being UTF-8, and OSError.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read_bytes = 0
    with Path(path).open("rb") as file:
        while True:
            chunk = file.read(PIECE_BYTES_MAX // 2)
            try:
                piece = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # The decoder's object starts with what the last chunk left undecoded.
                at = read_bytes + len(chunk) - len(error.object) + error.start
                raise InvalidRequest(
                    f"{os.fspath(path)} is not UTF-8 at byte {at} ({error.reason}); convert it, "
                    "for example with iconv -t UTF-8",
                    reason="NOT_UTF8",
                ) from None
            read_bytes += len(chunk)
            if piece:
                yield piece
            if not chunk:
                return


def token_pieces(tokens: Iterable[int]) -> Iterator[Sequence[int]]:
    """Cuts token ids into runs of at most PIECE_TOKENS_MAX.

    Raises InvalidRequest for an id outside [0, 2^32).
    """
    ids = iter(tokens)
    offset = 0
    while piece := list(islice(ids, PIECE_TOKENS_MAX)):
        for index, token in enumerate(piece):
            if not 0 <= token < _TOKEN_ID_LIMIT:
                raise InvalidRequest(
                    f"token id {token} at index {offset + index} is outside [0, 2^32); pass the "
                    "ids that the model's tokenizer gives"
                )
        offset += len(piece)
        yield piece


def _require_utf8(piece: str, offset: int) -> None:
    try:
        piece.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text has a lone surrogate {piece[error.start]!r} at character "
            f"{offset + error.start}, which has no UTF-8 form; decode its source with "
            'errors="strict" to find where it comes from',
            reason="NOT_UTF8",
        ) from None
