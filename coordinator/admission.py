"""Who may run: session slots of workers, handed out in order, with a bounded queue in front."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass

from longreach.errors import ResourceExhausted, Unavailable
from longreach.types import Identity


@dataclass(frozen=True, slots=True)
class WorkerSlots:
    """A worker that may get sessions: what KV it can use (tenant left empty) and how many fit."""

    worker_id: str
    identity: Identity
    max_sessions: int


def choose_worker(
    workers: Sequence[WorkerSlots],
    running: Mapping[str, int],
    identity: Identity,
    prefer: str,
    avoid: Collection[str] = (),
) -> str | None:
    """The preferred worker if it has a free slot, else the one with the most free, one of `avoid`
    only where there is no other; None if none."""
    free = {
        worker.worker_id: worker.max_sessions - running.get(worker.worker_id, 0)
        for worker in workers
        if worker.identity == identity
    }
    if free.get(prefer, 0) > 0:
        return prefer
    with_room = [worker_id for worker_id, slots in free.items() if slots > 0]
    return max(
        with_room, key=lambda worker_id: (worker_id not in avoid, free[worker_id]), default=None
    )


@dataclass(eq=False, slots=True)
class _Waiting:
    identity: Identity
    prefer: str
    avoid: Collection[str]
    slot: asyncio.Future[str]


class Admission:
    """Hands out slots first come, first served; over `max_waiting` it refuses.

    `workers` is asked anew each time, so that members may come and go.
    """

    def __init__(self, workers: Callable[[], Sequence[WorkerSlots]], max_waiting: int) -> None:
        self._workers = workers
        self._max_waiting = max_waiting
        self._running: Counter[str] = Counter()
        self._queue: deque[_Waiting] = deque()
        self._storing = 0
        self._closed = ""
        self._mean_s = 1.0

    @property
    def running(self) -> int:
        """Sessions that hold a slot."""
        return sum(self._running.values())

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot or for their prompt to be stored."""
        return len(self._queue) + self._storing

    def close(self, why: str) -> None:
        """Refuses new requests and those that wait; running ones go on."""
        self._closed = why
        for waiting in self._queue:
            if not waiting.slot.done():
                waiting.slot.set_exception(Unavailable(why, reason="DRAINING"))
        self._queue.clear()

    def check(self) -> None:
        """Raises Unavailable when closed and ResourceExhausted when the queue is full."""
        if self._closed:
            raise Unavailable(self._closed, reason="DRAINING")
        if self.waiting >= self._max_waiting and not self._has_free_slot():
            retry = self._retry_after_s()
            raise ResourceExhausted(
                f"{self.waiting} generations wait already and at most {self._max_waiting} may; "
                f"try again in {retry:.0f} s, or add workers",
                reason="QUEUE_FULL",
                retry_after_s=retry,
            )

    async def acquire(self, identity: Identity, prefer: str = "") -> str:
        """Waits for a slot on a worker that can use KV of this identity; returns the worker.

        The caller gives it back with `release`, whatever happens.
        """
        self.check()
        return await self._wait(identity, prefer, (), self._queue.append)

    async def acquire_again(
        self, identity: Identity, prefer: str, avoid: Collection[str] = ()
    ) -> str:
        """The same for a generation that lost its worker: it was admitted, so it goes before all
        who wait, also while the coordinator drains. Workers to `avoid` are a last resort."""
        return await self._wait(identity, prefer, avoid, self._queue.appendleft)

    async def _wait(
        self,
        identity: Identity,
        prefer: str,
        avoid: Collection[str],
        enqueue: Callable[[_Waiting], None],
    ) -> str:
        slot = asyncio.get_running_loop().create_future()
        waiting = _Waiting(identity, prefer, avoid, slot)
        enqueue(waiting)
        self.grant()
        try:
            return await waiting.slot
        except asyncio.CancelledError:
            if waiting in self._queue:
                self._queue.remove(waiting)
            elif _granted(waiting.slot):
                self.release(waiting.slot.result())
            raise

    def release(self, worker_id: str, seconds: float = 0.0) -> None:
        """Gives a slot back; `seconds` is how long it was used, for the retry hint."""
        self._running[worker_id] -= 1
        if seconds > 0:
            self._mean_s += 0.2 * (seconds - self._mean_s)
        self.grant()

    def grant(self) -> None:
        """Hands free slots to those who wait; called when a slot or a worker appears."""
        workers = self._workers()
        for waiting in list(self._queue):
            if waiting.slot.done():
                self._queue.remove(waiting)
                continue
            worker_id = choose_worker(
                workers, self._running, waiting.identity, waiting.prefer, waiting.avoid
            )
            if worker_id is not None:
                self._queue.remove(waiting)
                self._running[worker_id] += 1
                waiting.slot.set_result(worker_id)

    @contextlib.contextmanager
    def storing(self) -> Generator[None, None, None]:
        """Counts a request as waiting while its prompt is stored."""
        self.check()
        self._storing += 1
        try:
            yield
        finally:
            self._storing -= 1

    def _has_free_slot(self) -> bool:
        return any(w.max_sessions > self._running[w.worker_id] for w in self._workers())

    def _retry_after_s(self) -> float:
        slots = max(1, sum(worker.max_sessions for worker in self._workers()))
        return min(60.0, max(1.0, self._mean_s * self.waiting / slots))


def _granted(slot: asyncio.Future[str]) -> bool:
    return slot.done() and not slot.cancelled() and slot.exception() is None
