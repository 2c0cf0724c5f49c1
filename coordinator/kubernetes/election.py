"""Leader election by a Kubernetes Lease: decided from what was read and the clock alone.

The rules are those of client-go's leaderelection: a candidate never compares its clock with
another machine's. It remembers when it last saw the Lease change, and takes it once it has stood
still for its whole duration; the resource version makes the API server refuse all but one of
several that try. The fencing epoch is kept in an annotation and grows with every holder, beyond
any epoch that the catalog knows, so that the catalog refuses what a former leader writes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from coordinator.catalog.base import Lease

DURATION_S = 10.0
RENEW_S = 2.0
"""How often a holder renews and the others look: five tries within a lease."""


@dataclass(frozen=True, slots=True)
class LeaseObject:
    """A Lease as stored: `version` is the resource version, empty for one that does not exist.

    `acquired_at` and `renewed_at` are the API's texts; a holder writes them for people, and others
    only look whether they changed.
    """

    holder: str = ""
    epoch: int = 0
    duration_s: float = DURATION_S
    transitions: int = 0
    acquired_at: str = ""
    renewed_at: str = ""
    version: str = ""


class LeaseElection:
    """The election as the candidate `name` sees it. Times are seconds of one monotonic clock."""

    def __init__(self, name: str, duration_s: float = DURATION_S) -> None:
        self._name = name
        self._duration_s = duration_s
        self._seen = LeaseObject()
        self._changed_at = 0.0
        self._held_until = 0.0

    def observed(self, stored: LeaseObject, now: float) -> None:
        """Takes a Lease that was read; an empty one where none exists."""
        if dataclasses.replace(stored, version=self._seen.version) != self._seen:
            self._changed_at = now  # by its holder; that others touched the object means nothing
        self._seen = stored
        if stored.holder != self._name:
            self._held_until = 0.0

    def wanted(self, now: float, timestamp: str, known_epoch: int = 0) -> LeaseObject | None:
        """What to write, or None while another holds the Lease.

        `timestamp` is the time to write, `known_epoch` the highest fencing epoch heard of. An
        object without a version is to be created, another replaces that version.
        """
        seen = self._seen
        if seen.holder == self._name:
            stale = seen.epoch < known_epoch
            return dataclasses.replace(
                seen,
                duration_s=self._duration_s,
                renewed_at=timestamp,
                epoch=max(seen.epoch, known_epoch) + 1 if stale else seen.epoch,
            )
        free = not seen.version or not seen.holder
        if not free and now < self._changed_at + seen.duration_s:
            return None
        return LeaseObject(
            holder=self._name,
            epoch=max(seen.epoch, known_epoch) + 1,
            duration_s=self._duration_s,
            transitions=seen.transitions + (1 if seen.version else 0),
            acquired_at=timestamp,
            renewed_at=timestamp,
            version=seen.version,
        )

    def wrote(self, stored: LeaseObject, asked_at: float) -> None:
        """The API took a write that was sent at `asked_at`."""
        self._seen = stored
        self._changed_at = asked_at
        self._held_until = asked_at + self._duration_s

    def released(self) -> LeaseObject | None:
        """What a holder that stops writes, so that nobody waits for its lease to end."""
        seen = self._seen
        if seen.holder != self._name:
            return None
        return dataclasses.replace(seen, holder="", duration_s=1.0)

    def lease(self, now: float) -> Lease:
        """Who leads as far as is known; the time left counts from now."""
        if self._seen.holder != self._name:
            return Lease(self._seen.holder, self._seen.epoch, 0.0)
        return Lease(self._name, self._seen.epoch, max(0.0, self._held_until - now))
