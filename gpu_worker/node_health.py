"""What a worker knows of its nodes: how fast they answer, and whether they answer at all.

Decisions only: when a late request is worth a second one to another node, how long to wait for an
answer, and which node to leave alone for a while. Times are seconds of time.monotonic.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

HEDGE_S_MIN = 0.002
"""A request is never late before this: waking up takes a part of it."""
HEDGE_S_UNKNOWN = 0.25
"""When a request is late at a node whose latency is not known yet."""
DEADLINE_S_MIN = 1.0
DEADLINE_S_UNKNOWN = 5.0
ONLY_HOLDER_S_MIN = 5.0
"""A node that alone holds what is asked is waited for longer than one that has replicas."""
SAMPLES_MIN = 20
HEDGE_SHARE = 0.02
"""Extra requests, as a share of all."""
HEDGES_AT_ONCE = 8.0
SUSPECT_S = 5.0
"""How long a node that failed once is asked only where no other node holds the shard."""
FAILURES_MAX = 3
OPEN_S_MIN = 5.0
OPEN_S_MAX = 300.0

_KEPT = 128
_RENEW_AFTER = 16


class Latency:
    """How long a node took for requests of one size; percentiles over the last 128."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_KEPT)
        self._fresh = 0
        self.p50_s = 0.0
        self.p99_s = 0.0

    @property
    def known(self) -> bool:
        """Whether there are samples enough to go by."""
        return self.p99_s > 0

    def add(self, seconds: float) -> None:
        """Takes one answer's time."""
        self._seconds.append(seconds)
        self._fresh += 1
        if self._fresh >= _RENEW_AFTER and len(self._seconds) >= SAMPLES_MIN:
            ordered = sorted(self._seconds)
            self.p50_s = ordered[len(ordered) // 2]
            self.p99_s = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
            self._fresh = 0


class HedgeBudget:
    """A token bucket: extra requests are a small share of all, whatever happens."""

    def __init__(self) -> None:
        self._tokens = HEDGES_AT_ONCE

    def asked(self) -> None:
        """Counts an ordinary request."""
        self._tokens = min(HEDGES_AT_ONCE, self._tokens + HEDGE_SHARE)

    def take(self) -> bool:
        """Takes leave for an extra request."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


@dataclass(slots=True)
class NodeHealth:
    """One node, as its answers show it.

    `late` counts requests that it has not answered though others of their kind would have been
    long ago; while there are any, other nodes are preferred.
    """

    late: int = 0
    _by_size: dict[int, Latency] = field(default_factory=dict)
    _avoid_until: float = 0.0
    _open_until: float = 0.0
    _failures: int = 0
    _opened: int = 0
    _failed_at: float = float("-inf")

    def avoided(self, now: float) -> bool:
        """Whether to ask another node where one holds the same."""
        return self.late > 0 or now < self._avoid_until

    def refused(self, now: float) -> bool:
        """Whether not to ask it at all: its connections have failed again and again."""
        return now < self._open_until

    def answered(self, size: int, seconds: float) -> None:
        """Takes an answer: the node is well."""
        self._by_size.setdefault(size, Latency()).add(seconds)
        self._failures = self._opened = 0
        self._avoid_until = self._open_until = 0.0

    def failed(self, sent_at: float, now: float) -> None:
        """Takes a request that the node did not answer. All that one broken connection loses counts
        once. Three in a row and the node is left alone for 5 s, then twice as long, at most 300."""
        self._avoid_until = now + SUSPECT_S
        if sent_at <= self._failed_at:
            return
        self._failed_at = now
        self._failures += 1
        if self._failures >= FAILURES_MAX:
            self._open_until = now + min(OPEN_S_MAX, OPEN_S_MIN * 2**self._opened)
            self._opened += 1

    def misled(self, now: float) -> None:
        """Takes an answer that cannot be right: the node answers, so only others are preferred."""
        self._avoid_until = now + SUSPECT_S

    def renewed(self) -> None:
        """The node has just opened a session: what was before is over."""
        self._failures = self._opened = 0
        self._avoid_until = self._open_until = 0.0

    def hedge_after_s(self, size: int) -> float:
        """How long to wait for a request of this size before another node is asked too."""
        latency = self._by_size.get(size)
        if latency is None or not latency.known:
            return HEDGE_S_UNKNOWN
        return max(HEDGE_S_MIN, latency.p99_s, 3 * latency.p50_s)

    def patience_s(self, size: int, *, replicated: bool) -> float | None:
        """How long to wait for a request of this size at all; None where nothing is known of
        requests as large and no other node could answer."""
        p99_s = self._expected_p99_s(size)
        if replicated:
            return DEADLINE_S_UNKNOWN if p99_s is None else max(DEADLINE_S_MIN, 5 * p99_s)
        return None if p99_s is None else max(ONLY_HOLDER_S_MIN, 10 * p99_s)

    def _expected_p99_s(self, size: int) -> float | None:
        """Of the largest requests known that are not larger; twice as large may take twice as
        long."""
        known = [each for each, latency in self._by_size.items() if latency.known and each <= size]
        if not known:
            return None
        return self._by_size[max(known)].p99_s * 2.0 ** (size - max(known))
