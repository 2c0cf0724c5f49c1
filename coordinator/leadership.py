"""Whether this coordinator leads: decided from lease replies and the clock alone.

The leader alone writes states that follow from the nodes, rebuilds what only they remember, and
sweeps what they hold for nobody. All coordinators serve. A leader that cannot renew its lease stops
acting before another may begin; should clocks or networks defeat that, the fencing epoch makes the
catalog refuse its writes.
"""

from __future__ import annotations

from coordinator.catalog.base import Lease

MARGIN_S = 1.0
"""A leader stops this long before its lease ends."""


class Leadership:
    """The lease as this coordinator, `name`, knows it. Times are seconds of one monotonic clock."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._until = 0.0
        self._epoch = 0
        self._own_epoch = 0
        self.leader = ""

    @property
    def known_epoch(self) -> int:
        """The highest fencing epoch heard of."""
        return self._epoch

    def answered(self, lease: Lease, asked_at: float) -> bool:
        """Takes the reply to a request sent at `asked_at`; whether a new leadership begins here."""
        began = lease.holder == self._name and lease.epoch != self._own_epoch
        self.leader = lease.holder
        self._epoch = max(self._epoch, lease.epoch)
        if lease.holder == self._name:
            self._own_epoch = lease.epoch
            self._until = asked_at + lease.ttl_s - MARGIN_S
        else:
            self._until = 0.0
        return began

    def epoch(self, now: float) -> int:
        """The fencing epoch to act under; 0 while another leads, or none is known to."""
        return self._own_epoch if now < self._until else 0
