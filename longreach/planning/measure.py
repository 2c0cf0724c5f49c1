"""Measures this machine for the planner: memory bandwidth, and the round trip of a layer.

The round trip is a bidirectional gRPC stream to a process of its own, with messages of the size of
one layer of an 8B model (8 KiB of queries, 16.5 KiB of answers): what a layer of a decode step
costs on loopback before any search. The wire between machines comes on top.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import grpc
import numpy as np

from longreach.errors import Unavailable
from longreach.planning.echo import METHOD, SERVING, unchanged
from longreach.planning.machine import MachineProfile
from longreach.rpc.channels import sync_channel

BLOCK_BYTES = 64 << 20
"""Read by each core in a pass: more than its share of any cache."""

QUERY_BYTES = 8 << 10
_WARM_UP = 50
_EXCHANGES = 500
_PASSES = 5
_START_S = 20.0


def measure_machine() -> MachineProfile:
    """A profile of this machine, in a few seconds. Raises Unavailable when loopback fails."""
    return MachineProfile(
        memory_bytes_s=memory_bandwidth(os.cpu_count() or 1),
        round_trip_s=round_trip(),
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cpu=_cpu_name(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def memory_bandwidth(threads: int, block_bytes: int = BLOCK_BYTES) -> float:
    """Bytes/s that `threads` threads together read in order; the best of a few passes, since
    whatever disturbs a pass only slows it."""
    blocks = [np.ones(block_bytes // 8, np.int64) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def read_all() -> None:
            # The sum of a large array releases the GIL and keeps up with memory.
            list(pool.map(np.sum, blocks))

        return threads * block_bytes / min(_timed(read_all) for _ in range(_PASSES))


def round_trip(exchanges: int = _EXCHANGES) -> float:
    """Median seconds of an exchange on a long-lived stream with another process on loopback."""
    command = [sys.executable, "-m", "longreach.planning.echo"]
    echo = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert echo.stdout is not None
        line = echo.stdout.readline()
        if not line.startswith(SERVING):
            raise Unavailable("the echo process did not start; see its output above")
        with sync_channel(line.removeprefix(SERVING).strip()) as channel:
            return statistics.median(_exchange_times(channel, exchanges)[_WARM_UP:])
    except grpc.RpcError as error:
        raise Unavailable(f"no answer on loopback: {error}") from None
    finally:
        echo.kill()
        echo.wait()


def _exchange_times(channel: grpc.Channel, exchanges: int) -> list[float]:
    """Seconds of each exchange: the next query leaves when the answer to the last has come."""
    asked: list[float] = []
    times: list[float] = []
    query = bytes(QUERY_BYTES)
    may_ask = threading.Semaphore(1)

    def queries() -> Iterator[bytes]:
        for _ in range(_WARM_UP + exchanges):
            may_ask.acquire()
            asked.append(time.perf_counter())
            yield query

    call = channel.stream_stream(METHOD, unchanged, unchanged)(queries(), timeout=_START_S)
    for _ in call:
        times.append(time.perf_counter() - asked[-1])
        may_ask.release()
    return times


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            names = [line.partition(":")[2].strip() for line in info if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
