"""How a generation goes on when its worker or its nodes are lost: again, elsewhere, or not at all.

Decisions only; `coordinator/sessions.py` carries them out. Every attempt opens the session under a
higher epoch, so that whoever had it before can no longer write to its nodes.
"""

from __future__ import annotations

from collections.abc import Collection

from longreach.errors import DeadlineExceeded, LongreachError, Unavailable

ATTEMPT_EPOCHS = 1 << 20
"""Epochs that one attempt of the client may use up: a later attempt, at whichever coordinator,
begins above all of them without asking for the epoch that an earlier one had reached."""
ATTEMPTS_MAX = 1 << 20
PAUSES_S = (0.0, 0.1, 0.3, 0.5)
"""Pauses before the attempts of one outage; the last one is repeated."""
WORKER_LOST = "WORKER_LOST"
"""Reason of an error that ended every session of a worker."""

HEAL_AFTER_S = 2.0
"""How long a session goes without a node that it lost before it is opened with it again; twice as
long after each time that did not help, at most the second."""
HEAL_AFTER_S_MAX = 60.0

# The session is not where it was: opened anew it continues from what its nodes hold.
_REOPEN = frozenset(
    {
        "APPEND_GAP",
        "CONFLICTING_BYTES",
        "NO_SESSION_SLOT",
        "SESSION_CONFLICT",
        "SESSION_ENDED",
        "UNKNOWN_HANDLE",
        "UNKNOWN_SESSION",
        "WRONG_POSITION",
    }
)


def first_epoch(attempt: int) -> int:
    """The epoch under which a client's attempt begins."""
    return attempt * ATTEMPT_EPOCHS + 1


def may_pass(error: LongreachError) -> bool:
    """Whether a session that failed with this may go on when it is opened again."""
    return isinstance(error, Unavailable | DeadlineExceeded) or error.reason in _REOPEN


class Course:
    """What has befallen one generation.

    An outage begins with a failure and lasts until the generation has moved beyond the position
    where it failed. It may last `patience_s` seconds. Times are on one monotonic clock.
    """

    def __init__(self, patience_s: float) -> None:
        self.failovers = 0
        self.avoid: frozenset[str] = frozenset()
        self._patience_s = patience_s
        self._highest = -1
        self._since: float | None = None
        self._attempts = 0
        self._error: LongreachError | None = None

    def moved(self) -> None:
        """The session leaves its worker or its nodes by plan."""
        self.failovers += 1

    def failed(
        self, error: LongreachError, worker_id: str, position: int, now: float
    ) -> float | None:
        """Takes a failure at a position; returns how many seconds to wait before the next attempt,
        None when there is to be none."""
        if not may_pass(error):
            return None
        if self._since is None or position > self._highest:
            self._since, self._attempts, self.avoid = now, 0, frozenset()
        self._highest = max(self._highest, position)
        self._error = error
        if error.reason == WORKER_LOST:
            self.avoid |= {worker_id}
        pause_s = PAUSES_S[min(self._attempts, len(PAUSES_S) - 1)]
        self._attempts += 1
        if now + pause_s >= self._since + self._patience_s:
            return None
        self.failovers += 1
        return pause_s

    def left_s(self, now: float) -> float | None:
        """How long a worker may still be waited for; None before any failure."""
        if self._since is None:
            return None
        return max(0.0, self._since + self._patience_s - now)

    def out_of_patience(self) -> Unavailable:
        """The error when no worker took the generation over in time."""
        cause = self._error.message if self._error else "no worker is alive"
        return Unavailable(
            f"no worker took the generation over within {self._patience_s:g} s; it had stopped "
            f"with: {cause}; ask again when a worker is alive",
            reason="NO_WORKER",
            retry_after_s=2.0,
        )


class Healing:
    """When a session that lost nodes is opened anew so that they serve it again. Times are on one
    monotonic clock."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._wait_s = HEAL_AFTER_S

    def due(self, lagging: Collection[str], well: Collection[str], now: float) -> bool:
        """Whether to open it now: `lagging` are the nodes it lost, `well` those that are alive."""
        if not lagging:
            self._since, self._wait_s = None, HEAL_AFTER_S
            return False
        if self._since is None:
            self._since = now
        if now - self._since < self._wait_s or not set(lagging) & set(well):
            return False
        self._since = now
        self._wait_s = min(HEAL_AFTER_S_MAX, 2 * self._wait_s)
        return True
