"""A context being stored, and those who wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from coordinator.catalog.base import ContextRecord, ContextState
from longreach.errors import LongreachError


class Fill:
    """One prefill with any number of watchers; when the last one leaves early it is abandoned.

    The task that stores the context calls `update` with each new record and ends with `update` to
    READY, or with `fail`. `ended` is set when its clean-up is done as well.
    """

    def __init__(self, record: ContextRecord, on_abandoned: Callable[[Fill], None]) -> None:
        self.record = record
        self.task: asyncio.Task[None] | None = None
        self._on_abandoned = on_abandoned
        self._error: LongreachError | None = None
        self._changed = asyncio.Event()
        self._watchers = 0

    @property
    def done(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self._error is not None or self.record.state is ContextState.READY

    def update(self, record: ContextRecord) -> None:
        """Shows the watchers a new record."""
        self.record = record
        self._wake()

    def fail(self, error: LongreachError) -> None:
        """Ends the watchers with an error."""
        self._error = error
        self._wake()

    async def watch(self) -> AsyncGenerator[ContextRecord, None]:
        """The record now and after each change, the last one READY; raises what the fill raised.

        A slow watcher misses intermediate records.
        """
        self._watchers += 1
        try:
            while True:
                changed = self._changed
                if self._error is not None:
                    raise self._error
                record = self.record
                yield record
                if record.state is ContextState.READY:
                    return
                await changed.wait()
        finally:
            self._watchers -= 1
            if not self._watchers and not self.done:
                self._on_abandoned(self)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
