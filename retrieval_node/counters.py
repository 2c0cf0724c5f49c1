"""Work done since the start, counted cheaply enough for the token path."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import fields
from operator import add, attrgetter

from longreach.errors import LongreachError
from longreach.types import AttendResult, WorkFigures

_NAMES = [field.name for field in fields(WorkFigures)]
_figures = attrgetter(*_NAMES)


class Counters:
    """Attend requests answered and the sum of their work. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = 0
        self._sums = [0] * len(_NAMES)

    def count(self, results: Iterable[AttendResult | LongreachError]) -> None:
        """Counts a request and the work of the rows that were answered."""
        with self._lock:
            self._requests += 1
            for result in results:
                if isinstance(result, AttendResult):
                    self._sums = list(map(add, self._sums, _figures(result.work)))

    def totals(self) -> tuple[int, WorkFigures]:
        """Requests and work so far."""
        with self._lock:
            return self._requests, WorkFigures(*self._sums)
