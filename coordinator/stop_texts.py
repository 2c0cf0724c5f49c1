"""Stop texts: holds back text that may turn out to begin one, so that none leaks in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Filters a stream of text pieces.

    >>> stop = StopTexts(["END"])
    >>> stop.push("one E"), stop.push("vening EN"), stop.push("D more")
    ('one ', 'Evening ', '')
    >>> stop.found
    'END'
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """The text that is safe to emit now; nothing after a stop text was found."""
        if self.found is not None:
            return ""
        self._held += piece
        hits = [(at, text) for text in self._texts if (at := self._held.find(text)) >= 0]
        if hits:
            at, self.found = min(hits)
            emitted, self._held = self._held[:at], ""
            return emitted
        keep = max((_overlap(self._held, text) for text in self._texts), default=0)
        cut = len(self._held) - keep
        emitted, self._held = self._held[:cut], self._held[cut:]
        return emitted

    def flush(self) -> str:
        """What was held back, when the generation ends without a stop text."""
        emitted, self._held = self._held, ""
        return emitted


def _overlap(held: str, text: str) -> int:
    """Length of the longest end of `held` that is a proper beginning of `text`."""
    for length in range(min(len(held), len(text) - 1), 0, -1):
        if held.endswith(text[:length]):
            return length
    return 0
