"""One thread owns the device: short work first, long work one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from gpu_worker.scheduler import DeviceThread
from longreach.errors import Unavailable


@pytest.fixture
def device() -> Iterator[DeviceThread]:
    thread = DeviceThread()
    thread.start()
    yield thread
    thread.stop()


def test_all_work_runs_on_the_one_thread(device: DeviceThread) -> None:
    names = {device.call(lambda: threading.current_thread().name).result() for _ in range(5)}
    names.add(device.call_long(lambda: threading.current_thread().name).result())
    assert names == {"device"}


def test_short_work_runs_inside_long_work_at_its_safe_points(device: DeviceThread) -> None:
    order: list[str] = []
    begun, queued = threading.Event(), threading.Event()

    def long() -> None:
        order.append("long begins")
        begun.set()
        queued.wait()
        assert device.run_pending()
        order.append("long ends")

    work = device.call_long(long)
    begun.wait()
    waiting = device.call_long(lambda: order.append("next long"))
    step = device.call(lambda: order.append("step"))
    queued.set()
    for each in (work, waiting, step):
        each.result(5)
    assert order == ["long begins", "step", "long ends", "next long"]


def test_an_error_goes_to_whoever_asked(device: DeviceThread) -> None:
    failing = device.call(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(5)
    assert device.call(lambda: 2).result(5) == 2


def test_a_device_nobody_else_uses_is_not_shared(device: DeviceThread) -> None:
    assert device.call_long(device.run_pending).result(5) is False


def test_work_that_waits_when_the_thread_stops_is_refused() -> None:
    device = DeviceThread()
    device.start()
    begun, stopping = threading.Event(), threading.Event()

    def long() -> None:
        begun.set()
        stopping.wait()
        device.run_pending()

    work = device.call_long(long)
    begun.wait()
    waiting = device.call_long(lambda: None)
    stopper = threading.Thread(target=device.stop)
    stopper.start()
    while not device._stopping.is_set():
        pass
    stopping.set()
    stopper.join()
    for each in (work, waiting, device.call(lambda: None)):
        with pytest.raises(Unavailable):
            each.result(5)
