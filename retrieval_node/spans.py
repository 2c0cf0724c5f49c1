"""Sets of positions as disjoint spans."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from longreach.types import Span


class SpanSet:
    """Positions written so far. Almost always one span, because blocks come in order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, span: Span) -> None:
        """Adds the positions of `span`, joining spans that touch."""
        if not len(span):
            return
        first = bisect_left(self._stops, span.start)
        last = bisect_right(self._starts, span.stop)
        start, stop = span.start, span.stop
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def overlaps(self, span: Span) -> list[Span]:
        """Parts of `span` that are in the set, ascending."""
        parts = (
            Span(start, stop).intersect(span)
            for start, stop in zip(self._starts, self._stops, strict=True)
        )
        return [part for part in parts if len(part)]

    def first_gap(self, span: Span) -> int | None:
        """First position of `span` that is not in the set; None when all are."""
        position = span.start
        for part in self.overlaps(span):
            if part.start > position:
                break
            position = part.stop
        return position if position < span.stop else None

    def __len__(self) -> int:
        return sum(self._stops) - sum(self._starts)
