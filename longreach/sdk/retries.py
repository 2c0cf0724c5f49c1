"""Which coordinator to ask next, and when to stop asking. Decisions only, for both clients."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

from longreach.errors import ConnectionLost, LongreachError, Unavailable
from longreach.v1 import generation_pb2 as pb

RETRY_S = 30.0
"""How long a call that lost its coordinator is tried again before it fails."""
ROUND_PAUSE_S = 0.2
"""Pause after every coordinator was asked once."""
LOOK_AFTER_S = 0.7
LOOK_TIMEOUT_S = 0.7
"""A call that is silent for the first makes the client ask its coordinator for a sign of life. When
it gives none within the second, the call goes to another one."""


def split_addresses(addresses: str) -> tuple[str, ...]:
    """The coordinators in "HOST:PORT,HOST:PORT"."""
    return tuple(part.strip() for part in addresses.split(",") if part.strip()) or ("",)


def is_lost(error: LongreachError) -> bool:
    """Whether a call failed because its coordinator is gone, or about to go."""
    return isinstance(error, ConnectionLost) or error.reason == "DRAINING"


class Retries:
    """The attempts of one call at `count` coordinators, the first at `index`.

    With one coordinator a call is tried again only where it had `begun`: a wrong address should
    fail at once. What one coordinator cannot do at the moment is asked of each other one once, and
    for longer after a coordinator was lost: the others may be about to take over. Times are those
    of `clock`, seconds.
    """

    def __init__(
        self,
        count: int,
        index: int,
        retry_s: float = RETRY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.index = index
        self.attempt = 0
        self._count = count
        self._retry_s = retry_s
        self._clock = clock
        self._begun = False
        self._any_lost = False
        self._lost_at: float | None = None
        self._in_round = 0

    def begun(self) -> None:
        """Something came from the coordinator: an outage is over."""
        self._begun = True
        self._lost_at = None

    def failed(self, error: LongreachError) -> float | None:
        """Takes an attempt's failure; the pause before the next one, None when there is none."""
        self._any_lost = self._any_lost or is_lost(error)
        if not isinstance(error, Unavailable) or (self._count == 1 and not self._begun):
            return None
        if not self._any_lost and self.attempt + 1 >= self._count:
            return None
        now = self._clock()
        if self._lost_at is None:
            self._lost_at, self._in_round = now, 0
        if now - self._lost_at >= self._retry_s:
            return None
        self.attempt += 1
        self.index = (self.index + 1) % self._count
        self._in_round += 1
        return 0.0 if self._in_round % self._count else ROUND_PAUSE_S


class Resumption:
    """A generation over several attempts: what the next one must say."""

    def __init__(
        self,
        request: pb.GenerateRequest,
        retries: Retries,
        timeout_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.retries = retries
        self._request = request
        self._request.request_id = request.request_id or f"req-{secrets.token_hex(8)}"
        self._request.resume.key = secrets.token_hex(16)
        self._clock = clock
        self._deadline = None if timeout_s is None else clock() + timeout_s

    @property
    def request(self) -> pb.GenerateRequest:
        """The request of the current attempt."""
        self._request.resume.attempt = self.retries.attempt
        return self._request

    @property
    def timeout_s(self) -> float | None:
        """What is left of the call's time."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def received(self, tokens: Iterable[Any]) -> None:
        """Takes the tokens of a message: they are not to be sent again."""
        self.retries.begun()
        self._request.resume.token_ids.extend(token.id for token in tokens)

    def failed(self, error: LongreachError) -> float | None:
        """The pause before the next attempt; None when there is none."""
        if self.timeout_s == 0.0:
            return None
        return self.retries.failed(error)


def silent(address: str) -> ConnectionLost:
    """The error of a call whose coordinator gives no sign of life."""
    waited_s = LOOK_AFTER_S + LOOK_TIMEOUT_S
    return ConnectionLost(f"{address}: no sign of life from the coordinator in {waited_s:g} s")
