"""Finds the stored context that shares the longest beginning with a prompt.

Tokens are hashed in blocks of 64, each hash covering everything before it as well (a chain), so
two sequences have the same n-th hash exactly when their first 64 n tokens are equal. The chain
starts from the identity, tenant included: KV of another model or tenant is never found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from coordinator.tenancy import identity_bytes
from longreach.types import BOUNDARY_TOKENS, Identity

_TOKEN_BYTES = 4
_HASH_BYTES = 16


def chain(identity: Identity, token_ids: Sequence[int]) -> Iterator[bytes]:
    """The hash of the first 64 tokens, of the first 128, and so on; a shorter rest has none."""
    data = np.asarray(token_ids, "<u4").tobytes()
    block = BOUNDARY_TOKENS * _TOKEN_BYTES
    state = hashlib.blake2b(identity_bytes(identity), digest_size=_HASH_BYTES).digest()
    for start in range(0, len(data) - block + 1, block):
        link = state + data[start : start + block]
        state = hashlib.blake2b(link, digest_size=_HASH_BYTES).digest()
        yield state


class PrefixIndex:
    """Contexts by the hashes of their beginnings."""

    def __init__(self) -> None:
        self._contexts: dict[bytes, dict[str, None]] = {}
        self._chains: dict[str, tuple[bytes, ...]] = {}

    def __contains__(self, context_id: str) -> bool:
        return context_id in self._chains

    def add(self, context_id: str, identity: Identity, token_ids: Sequence[int]) -> None:
        """Makes a context findable."""
        if context_id in self._chains:
            return
        hashes = self._chains[context_id] = tuple(chain(identity, token_ids))
        for each in hashes:
            self._contexts.setdefault(each, {})[context_id] = None

    def remove(self, context_id: str) -> None:
        """Forgets a context."""
        for each in self._chains.pop(context_id, ()):
            holders = self._contexts[each]
            del holders[context_id]
            if not holders:
                del self._contexts[each]

    def longest(
        self,
        identity: Identity,
        token_ids: Sequence[int],
        usable: Callable[[str], bool] = lambda context_id: True,
    ) -> tuple[str, int] | None:
        """A usable context and how many tokens, a multiple of 64, it shares with these; or None."""
        found: tuple[str, int] | None = None
        stop = 0
        for each in chain(identity, token_ids):
            stop += BOUNDARY_TOKENS
            holders = self._contexts.get(each)
            if holders is None:
                break
            best = next((name for name in holders if usable(name)), None)
            if best is not None:
                found = (best, stop)
        return found
