"""Slots in order, a bounded queue, and the choice of a worker."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.admission import Admission, WorkerSlots, choose_worker
from longreach.errors import ResourceExhausted, Unavailable
from longreach.types import Identity

M = Identity("m", "r", "float32")
OTHER = Identity("m", "r2", "float32")


def _workers(**slots):
    return [WorkerSlots(name, M, count) for name, count in slots.items()]


def test_the_preferred_worker_is_taken_while_it_has_room():
    workers = _workers(a=2, b=4)
    assert choose_worker(workers, {}, M, prefer="a") == "a"
    assert choose_worker(workers, {"a": 2}, M, prefer="a") == "b"
    assert choose_worker(workers, {"a": 1, "b": 2}, M, prefer="") == "b"
    assert choose_worker(workers, {"a": 2, "b": 4}, M, prefer="a") is None


def test_a_worker_of_another_identity_is_never_taken():
    assert choose_worker([WorkerSlots("a", OTHER, 4)], {}, M, prefer="a") is None


async def test_slots_are_handed_out_in_order():
    admission = Admission(lambda: _workers(a=1), max_waiting=8)
    order = []

    async def hold(i):
        worker = await admission.acquire(M)
        order.append(i)
        await asyncio.sleep(0)
        admission.release(worker)

    await asyncio.gather(*(hold(i) for i in range(5)))
    assert order == [0, 1, 2, 3, 4]
    assert (admission.running, admission.waiting) == (0, 0)


async def test_the_queue_is_bounded_and_says_when_to_come_back():
    admission = Admission(lambda: _workers(a=1), max_waiting=1)
    worker = await admission.acquire(M)
    waiting = asyncio.create_task(admission.acquire(M))
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted) as caught:
        await admission.acquire(M)
    assert caught.value.retry_after_s >= 1
    admission.release(worker, seconds=30)
    assert await waiting == "a"


async def test_with_no_queue_at_all_a_free_slot_is_still_given():
    admission = Admission(lambda: _workers(a=1), max_waiting=0)
    assert await admission.acquire(M) == "a"
    with pytest.raises(ResourceExhausted):
        await admission.acquire(M)


async def test_prompts_that_are_being_stored_count_as_waiting():
    admission = Admission(lambda: _workers(a=1), max_waiting=1)
    await admission.acquire(M)
    with admission.storing():
        assert admission.waiting == 1
        with pytest.raises(ResourceExhausted):
            admission.check()
    assert admission.waiting == 0


async def test_a_worker_that_appears_serves_who_waits():
    workers = []
    admission = Admission(lambda: workers, max_waiting=4)
    waiting = asyncio.create_task(admission.acquire(M))
    await asyncio.sleep(0)
    assert not waiting.done()
    workers.extend(_workers(a=1))
    admission.grant()
    assert await waiting == "a"


@pytest.mark.parametrize("granted_first", [False, True])
async def test_a_cancelled_wait_loses_no_slot(granted_first):
    admission = Admission(lambda: _workers(a=1), max_waiting=4)
    worker = await admission.acquire(M)
    waiting = asyncio.create_task(admission.acquire(M))
    await asyncio.sleep(0)
    if granted_first:
        admission.release(worker)  # the slot is granted, the waiter has not woken up yet
        waiting.cancel()
    else:
        waiting.cancel()
        await asyncio.sleep(0)
        admission.release(worker)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (admission.running, admission.waiting) == (0, 0)
    assert await admission.acquire(M) == "a"


async def test_a_waiter_for_a_missing_model_does_not_block_the_others():
    admission = Admission(lambda: _workers(a=1), max_waiting=4)
    stuck = asyncio.create_task(admission.acquire(OTHER))
    await asyncio.sleep(0)
    assert await admission.acquire(M) == "a"
    stuck.cancel()


async def test_closing_ends_waiters_and_refuses_newcomers():
    admission = Admission(lambda: _workers(a=1), max_waiting=4)
    await admission.acquire(M)
    waiting = asyncio.create_task(admission.acquire(M))
    await asyncio.sleep(0)
    admission.close("going down")
    with pytest.raises(Unavailable, match="going down"):
        await waiting
    with pytest.raises(Unavailable):
        await admission.acquire(M)
