"""Placement epochs: which change of a context's shard map this node has taken part in last.

A coordinator that led once, and does not know yet that another leads, decides on an older map.
What it asks for carries that map's epoch and is refused here, even where its write to the catalog
has not been refused yet.
"""

from __future__ import annotations

import threading

from longreach.errors import StaleEpoch


class PlacementFences:
    """The highest epoch by context. Thread-safe."""

    def __init__(self) -> None:
        self._epochs: dict[str, int] = {}
        self._lock = threading.Lock()

    def pass_or_raise(self, context_id: str, epoch: int) -> None:
        """Notes an epoch; raises StaleEpoch where a higher one was here before."""
        with self._lock:
            known = self._epochs.get(context_id, 0)
            if epoch < known:
                raise StaleEpoch(
                    f"the placement of context {context_id!r} is at epoch {known} and this was "
                    f"decided at epoch {epoch}; another coordinator leads: read the map again"
                )
            self._epochs[context_id] = epoch

    def forget(self, context_id: str) -> None:
        """The context was dropped."""
        with self._lock:
            self._epochs.pop(context_id, None)
