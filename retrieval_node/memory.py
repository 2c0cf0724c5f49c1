"""The node's memory budget: everything large is reserved before it is allocated."""

from __future__ import annotations

import threading
from enum import Enum

from longreach.errors import ResourceExhausted


class Use(Enum):
    """What reserved memory is for."""

    CONTEXT = "contexts"
    INDEX = "indexes"
    TAIL = "tails"


class MemoryBudget:
    """Bytes that contexts, indexes and tails may use together. Thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._used = dict.fromkeys(Use, 0)
        self._lock = threading.Lock()

    def reserve(self, use: Use, nbytes: int, what: str) -> Reservation:
        """Reserves `nbytes`; raises ResourceExhausted, naming `what`, when they do not fit."""
        reservation = Reservation(self, use, what)
        reservation.grow(nbytes)
        return reservation

    def used(self, use: Use) -> int:
        """Bytes reserved for a use."""
        with self._lock:
            return self._used[use]

    def _take(self, use: Use, nbytes: int, what: str) -> None:
        with self._lock:
            total = sum(self._used.values())
            if total + nbytes > self.limit_bytes:
                uses = ", ".join(f"{n} by {u.value}" for u, n in self._used.items())
                raise ResourceExhausted(
                    f"{what} needs {nbytes} bytes, but {total} of the node's {self.limit_bytes} "
                    f"are used ({uses}); drop contexts, close sessions, raise "
                    "--memory-limit-bytes or add nodes",
                    reason="NODE_MEMORY_EXHAUSTED",
                )
            self._used[use] += nbytes

    def _give_back(self, use: Use, nbytes: int) -> None:
        with self._lock:
            self._used[use] -= nbytes


class Reservation:
    """Bytes held of a budget until they are released. Growing and releasing are thread-safe."""

    def __init__(self, budget: MemoryBudget, use: Use, what: str) -> None:
        self._budget = budget
        self._use = use
        self._what = what
        self._lock = threading.Lock()
        self._released = False
        self.nbytes = 0

    def grow(self, nbytes: int) -> None:
        """Reserves `nbytes` more; raises ResourceExhausted and keeps what it had when they do
        not fit. Growing what was released does nothing: its owner is gone."""
        with self._lock:
            if self._released:
                return
            self._budget._take(self._use, nbytes, self._what)
            self.nbytes += nbytes

    def shrink(self, nbytes: int) -> None:
        """Gives `nbytes` of what it has back; nothing once it was released."""
        with self._lock:
            if self._released:
                return
            self.nbytes -= nbytes
            self._budget._give_back(self._use, nbytes)

    def release(self) -> int:
        """Gives everything back, once; returns the bytes given back."""
        with self._lock:
            self._released = True
            freed, self.nbytes = self.nbytes, 0
            self._budget._give_back(self._use, freed)
            return freed


def resident_bytes() -> int:
    """Resident memory of this process as the kernel counts it."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0
