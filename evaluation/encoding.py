"""Text to token ids and back, as the evaluated model's own tokenizer does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Encoder:
    """A Hugging Face tokenizer, with what it puts in front of a prompt apart from the text.

    `start_ids`: the tokens every context begins with, such as BOS; often none.
    """

    def __init__(self, tokenizer: Any, name: str = "") -> None:
        self._tokenizer = tokenizer
        self.name = name or type(tokenizer).__name__
        ends = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)}
        ids = list(tokenizer("")["input_ids"])
        while ids and ids[-1] in ends:
            ids.pop()
        self.start_ids: tuple[int, ...] = tuple(ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def count(self, text: str) -> int:
        """How many tokens a text takes."""
        return len(self.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def load_encoder(model: str) -> Encoder:
    """The tokenizer of a model directory or hub name."""
    from transformers import AutoTokenizer

    return Encoder(AutoTokenizer.from_pretrained(model), Path(model).name)
