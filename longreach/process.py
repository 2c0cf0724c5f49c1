"""What every service process does the same way: announce its address, run until told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from types import FrameType

_PARENT_CHECK_S = 0.5
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Taken at import, so that a parent that dies while the service starts is noticed too.
_PARENT_PID = os.getppid()


def announce(address: str) -> None:
    """Prints the one line of stdout, `serving HOST:PORT`, when the service answers there."""
    print(f"serving {address}", flush=True)


def wait_for_stop(exit_with_parent: bool = False, *, address: str = "") -> None:
    """Blocks until SIGTERM or SIGINT or, when asked, until the parent process is gone.

    `address` is announced once signals are caught, so that whoever reads the line may send one at
    once. Main thread only. A second signal ends the process, as if there were no handler.
    """
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        stop.set()

    for number in _STOP_SIGNALS:
        signal.signal(number, on_signal)
    if address:
        announce(address)
    while not stop.wait(_PARENT_CHECK_S):
        if exit_with_parent and _parent_is_gone():
            return


async def wait_for_stop_async(exit_with_parent: bool = False, *, address: str = "") -> None:
    """The same for a service that runs an event loop."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        stop.set()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    if address:
        announce(address)
    while not (exit_with_parent and _parent_is_gone()):
        try:
            async with asyncio.timeout(_PARENT_CHECK_S):
                await stop.wait()
            return
        except TimeoutError:
            continue


def _parent_is_gone() -> bool:
    return os.getppid() != _PARENT_PID
