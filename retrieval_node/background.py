"""Threads whose work may wait: they get the CPU that the token path leaves."""

from __future__ import annotations

import os
import threading

_NICENESS = 10
_LOWEST = 19


def lower_priority() -> None:
    """Makes the calling thread, and threads it starts, less urgent than the rest of the process."""
    niceness = min(_LOWEST, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
