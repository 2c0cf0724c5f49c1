"""The KV heads of a layer side by side, on a CPU's cores.

A sparse prefill is thousands of small products. Torch's threads each take a part of one product and
wait for each other after it, which hardly helps with small ones. KV heads do not depend on each
other, so each is given a thread of its own, with its share of torch's threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def for_each_head(
    work: Callable[[int], Result], kv_heads: int, device: torch.device
) -> list[Result]:
    """work(0) ... work(kv_heads - 1), side by side where `device` is a CPU; raises what the first
    that fails raises, when all have ended."""
    threads = torch.get_num_threads()
    workers = min(kv_heads, threads)
    if device.type != "cpu" or workers == 1:
        return [work(head) for head in range(kv_heads)]
    inference = torch.is_inference_mode_enabled()

    def run(head: int) -> Result:
        with torch.inference_mode(inference):  # the mode is a thread's own
            return work(head)

    futures = [_pool(workers, threads).submit(run, head) for head in range(kv_heads)]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
    return [future.result() for future in futures]


def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Threads that have `threads` of torch's between them."""
    share = threads // workers
    with _pools_lock:
        pool = _pools.get((workers, share))
        if pool is None:
            started = threading.Barrier(workers)

            def start() -> None:
                torch.get_num_threads()  # torch sets a thread up at its first call
                torch.set_num_threads(share)
                started.wait()

            pool = ThreadPoolExecutor(workers, "head", initializer=start)
            list(pool.map(lambda _: None, range(workers)))
            # The number is each thread's own, but new threads begin with what was set last.
            torch.set_num_threads(threads)
            _pools[workers, share] = pool
        return pool
