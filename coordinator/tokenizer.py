"""Text to token ids and back, with the tokenizer of the model that a worker serves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from longreach.errors import FailedPrecondition

REPLACEMENT = "\ufffd"
# Bytes of a character that may still be missing its last one.
INCOMPLETE_MAX = 3
# A run this long that never ends on a whole character is noise; decoding it again and again from
# its beginning would cost more with each token.
HELD_TOKENS_MAX = 256
# Prompt tokens decoded before the first generated one, so that decoders which treat the start of
# a text differently (a dropped leading space) see that it is not the start.
PROMPT_TAIL_TOKENS = 6


class Tokenizer:
    """A Hugging Face tokenizer, loaded from a model folder or by hub name.

    A text that starts a sequence gets the model's special tokens (the beginning-of-sequence token
    in most families); a text that continues one gets none. An end-of-sequence token that a
    template would add is left out: more text follows.
    """

    def __init__(self, core: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> None:
        self._core = core
        self._bos = _bos_id(core, config or {})
        self._special = frozenset(
            token_id for token_id, token in core.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def load(cls, source: str) -> Tokenizer:
        """Reads tokenizer.json and tokenizer_config.json; raises FailedPrecondition without them.

        Blocks: call it on a thread.
        """
        folder = Path(source)
        try:
            if not folder.is_dir():
                return cls(tokenizers.Tokenizer.from_pretrained(source))
            core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as problem:  # the library raises plain Exception
            raise FailedPrecondition(
                f"no tokenizer at {source!r} ({problem}); send token ids instead of text, or put "
                "tokenizer.json beside the model where this coordinator can read it",
                reason="NO_TOKENIZER",
            ) from None
        config = folder / "tokenizer_config.json"
        return cls(core, json.loads(config.read_text()) if config.exists() else None)

    def encode(self, text: str, *, starts: bool) -> list[int]:
        """Token ids of a text; `starts`: it begins a sequence. Blocks for long texts."""
        plain: list[int] = self._core.encode(text, add_special_tokens=False).ids
        if not starts:
            return plain
        ids: list[int] = self._core.encode("", add_special_tokens=True).ids
        if self._bos is not None:
            return [self._bos, *plain]
        # A template around the empty text: only its first token can be a beginning.
        return [*ids[:1], *plain] if len(ids) > 1 else plain

    def is_special(self, token_id: int) -> bool:
        """Whether a token reads as nothing, such as the end-of-sequence token."""
        return token_id in self._special

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; incomplete characters become U+FFFD."""
        return str(self._core.decode(list(token_ids), skip_special_tokens=True))


def _bos_id(core: tokenizers.Tokenizer, config: dict[str, Any]) -> int | None:
    """The token that starts a sequence, from the tokenizer's own template, else from its config."""
    template: list[int] = core.encode("", add_special_tokens=True).ids
    if len(template) == 1:
        name = core.id_to_token(template[0])
        return None if name == _token_name(config.get("eos_token")) else template[0]
    if not template and config.get("add_bos_token"):
        found = core.token_to_id(_token_name(config.get("bos_token")))
        return None if found is None else int(found)
    return None


def _token_name(entry: Any) -> str:
    """A token of tokenizer_config.json: either its text or an object that holds it."""
    return str(entry.get("content", "") if isinstance(entry, dict) else entry or "")


class Detokenizer:
    """Turns token ids into text as they come, never emitting half a character.

    A character may be spread over several tokens, and how a token reads may depend on the one
    before. So the text is decoded over a window that reaches back to the last clean boundary
    before the last emission, and what it adds is emitted once it ends on a whole character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_ids[-PROMPT_TAIL_TOKENS:])
        self._clean = len(self._window)  # window tokens that belong to emitted, whole characters
        self._shown = _whole(tokenizer.decode(self._window))  # text of the window that is emitted

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if self._tokenizer.is_special(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        whole = _whole(text)
        held = len(self._window) - self._clean
        if whole != text and held <= HELD_TOKENS_MAX:
            # Byte-fallback decoders spoil the characters before an incomplete one until it is
            # complete; what they say meanwhile is not to be believed.
            return self._show(whole) if whole.startswith(self._shown) else ""
        added = self._show(text)
        if added:
            self._window = self._window[self._clean :]
            self._clean = len(self._window)
            self._shown = self._tokenizer.decode(self._window)
        return added

    def flush(self) -> str:
        """What is left at the end: an incomplete character, as U+FFFD."""
        return self._show(self._tokenizer.decode(self._window))

    def _show(self, text: str) -> str:
        added = text[len(self._shown) :]
        self._shown = text
        return added


def _whole(text: str) -> str:
    """The text without what may be an incomplete character at its end.

    Some decoders write one U+FFFD for it and some one for each byte; more than that is noise.
    """
    end = len(text)
    while end > max(0, len(text) - INCOMPLETE_MAX) and text[end - 1] == REPLACEMENT:
        end -= 1
    return text[:end]
