"""The one thread that owns the device.

Short work (steps, writes to the slab) goes first; long work (prefills) runs one at a time and lets
short work in at its own safe points, by calling `run_pending` from within.
"""

from __future__ import annotations

import contextvars
import functools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from longreach.errors import Unavailable

T = TypeVar("T")

SHARED_FOR_S = 1.0
"""How long after a piece of short work the device counts as shared."""

_Work = tuple["Future[Any]", Callable[[], Any]]


class DeviceThread:
    """Runs work in order on a thread of its own. `start` before use, `stop` at the end."""

    def __init__(self, name: str = "device") -> None:
        self._short: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._long: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._wake = threading.Semaphore(0)
        self._stopping = threading.Event()
        self._last_short = float("-inf")
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begins to work."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the work under way; what still waits fails with Unavailable."""
        self._stopping.set()
        self._wake.release()
        self._thread.join()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Queues short work: it runs before any long work that waits, and between its chunks."""
        return self._add(self._short, work)

    def call_long(self, work: Callable[[], T]) -> Future[T]:
        """Queues long work, which calls `run_pending` at its safe points."""
        return self._add(self._long, work)

    def run_pending(self) -> bool:
        """Runs short work that waits; called by long work. Whether others use the device."""
        while self._run_one(self._short):
            pass
        if self._stopping.is_set():
            raise _stopped()
        return time.monotonic() - self._last_short < SHARED_FOR_S

    def _add(self, where: queue.SimpleQueue[_Work], work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        if self._stopping.is_set():
            future.set_exception(_stopped())
            return future
        # In the caller's context, so that logs say whose work it is.
        where.put((future, functools.partial(contextvars.copy_context().run, work)))
        self._wake.release()
        return future

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.acquire()
            while not self._stopping.is_set() and (
                self._run_one(self._short) or self._run_one(self._long)
            ):
                pass
        for waiting in (self._short, self._long):
            while not waiting.empty():
                waiting.get()[0].set_exception(_stopped())

    def _run_one(self, waiting: queue.SimpleQueue[_Work]) -> bool:
        try:
            future, work = waiting.get_nowait()
        except queue.Empty:
            return False
        if not future.set_running_or_notify_cancel():
            return True
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        if waiting is self._short:
            self._last_short = time.monotonic()
        return True


def _stopped() -> Unavailable:
    return Unavailable("this worker is stopping; use another", reason="STOPPING")
