"""A generation on this worker: where it stands and where its KV is."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.routes import Route
from longreach.errors import LongreachError
from longreach.types import Budget, SessionRecord, Span, retrieval_scope


@dataclass(slots=True)
class Session:
    """`length` positions are committed; it moves only when a step succeeded for this session.

    `last_used` is on the clock of time.monotonic. `broken` is set when the session can never go on
    here, for example because another writer took it over.
    """

    record: SessionRecord
    budget: Budget
    min_coverage: float
    slot: int
    length: int
    route: Route
    last_used: float
    broken: LongreachError | None = None

    @property
    def session_id(self) -> str:
        """Unique in the cluster."""
        return self.record.session_id

    def scope(self, sink: int, window: int) -> Span:
        """Positions that nodes serve to the next rows."""
        return retrieval_scope(self.length, sink, window)
