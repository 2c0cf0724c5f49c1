"""API keys of the public API: a file with one a line, read again when it changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from longreach.errors import InvalidRequest, Unauthenticated

CHECK_INTERVAL_S = 1.0
SCHEME = "bearer "
_log = logging.getLogger(__name__)


class ApiKeys:
    """The keys of a file; with an empty path everybody is let in.

    Raises InvalidRequest where the file cannot be read or has no key at the start. One that
    becomes unreadable or empty later leaves the last keys in force.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = Path(path) if path else None
        self._clock = clock
        self._digests: frozenset[bytes] = frozenset()
        self._stamp: tuple[int, int] | None = None
        self._checked_at = 0.0
        if self._path is not None:
            try:
                self._read(self._path)
            except OSError as problem:
                raise InvalidRequest(f"api_keys_file {path!r} cannot be read: {problem}") from None
            if not self._digests:
                raise InvalidRequest(f"api_keys_file {path!r} has no key; write one a line")

    def check(self, authorization: str) -> None:
        """Raises Unauthenticated unless the header's value is `Bearer KEY` with a known key."""
        if self._path is None:
            return
        self._refresh(self._path)
        given = authorization[len(SCHEME) :] if authorization.lower().startswith(SCHEME) else ""
        digest = _digest(given.strip())
        # Every key is compared: the time says nothing about which one was near.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise Unauthenticated(
                f"{'the API key is not known' if given else 'no API key was given'}; send the "
                "header Authorization: Bearer KEY (the SDK: api_key=...)",
                reason="BAD_API_KEY",
            )

    def _refresh(self, path: Path) -> None:
        now = self._clock()
        if now < self._checked_at + CHECK_INTERVAL_S:
            return
        self._checked_at = now
        before = self._digests
        try:
            self._read(path)
        except OSError as problem:
            _log.warning("api_keys_file: %s; the last keys stay in force", problem)
        if not self._digests:
            _log.warning("api_keys_file has no key any more; the last keys stay in force")
            self._digests = before

    def _read(self, path: Path) -> None:
        state = os.stat(path)
        stamp = (state.st_mtime_ns, state.st_size)
        if stamp != self._stamp:
            lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
            self._digests = frozenset(_digest(line) for line in lines if line)
            self._stamp = stamp


def _digest(key: str) -> bytes:
    """Digests are compared, so that their lengths are equal. An empty key is never known."""
    return hashlib.sha256(key.encode()).digest()
