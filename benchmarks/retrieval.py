"""Every index kind and its peers on one KV head: time at a recall, error, size and build time.

All methods run interleaved in one process on one thread: for each decode step every method answers
the four query heads of a group, right after 96 MB were streamed through the caches (cold) and again
(warm). Peers are timed for the search alone, longreach's kinds for search and attention. Each
method is timed at the cheapest widths whose recall of the best 100 keys reaches .90, .95, .97, .99.
Files are written after each scene, a data set of one size: --resume goes on after the last one.
Recall alone says little about attention, so errors of the output and of the LSE against full
attention, and the attention mass covered, stand beside it.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import retrieval_node.index  # noqa: F401  (registers every kind)
from benchmarks.peers import PEERS, Peer
from benchmarks.report import Report, argument_parser
from benchmarks.retrieval_methods import (
    Method,
    built_kind,
    index_path,
    kind_methods,
    peer_methods,
)
from benchmarks.retrieval_targets import KEYS, check_targets
from benchmarks.retrieval_threads import measure_threads
from benchmarks.roargraph_in_faiss import RoarGraphInFaiss
from benchmarks.scene import (
    TOP,
    Bandwidth,
    Scene,
    cold_seconds,
    measure_bandwidth,
    warm_seconds,
)
from retrieval_node import kernel
from retrieval_node.index.base import INDEX_KINDS
from retrieval_node.index.faiss_kind import faiss_threads
from retrieval_node.index.roargraph import RoarGraphIndex

FIRST_KINDS = ("flat", "sketch")
"""Kinds measured before any peer."""
SLOW_KINDS = ("hnsw", "roargraph")
"""Kinds whose build takes minutes."""


def interleave(methods: list[Method], steps: int) -> None:
    """Times every method on every step, in turn.

    The order is drawn anew for each step, so that none always follows the same one: what a wide
    vector kernel does to the clock, or a library to the caches, lasts into the next call.
    """
    for step in range(steps):
        for method in random.Random(step).sample(methods, len(methods)):

            def call(run: Callable[[int], object] = method.run, step: int = step) -> object:
                return run(step)

            method.cold.append(cold_seconds(call))
            method.warm.append(warm_seconds(call))


def measure(scene: Scene, plan: Plan) -> list[dict[str, Any]]:
    """All methods on one scene, one row for each width."""
    bandwidth = measure_bandwidth(scene)
    methods: list[Method] = []
    for what, slow, prepare in plan.jobs(scene):
        if not plan.leaves_out(f"{what} on {scene.label}", slow):
            methods += prepare()
    interleave(methods, scene.steps)
    return [row_of(scene, method, bandwidth) for method in methods]


def prepared_kind(kind: str, scene: Scene, cache: Path) -> Iterator[Method]:
    """The methods of one of our kinds; a graph comes with the same graph under faiss's search."""
    built = built_kind(kind, scene, cache)
    yield from kind_methods(kind, built, scene)
    if isinstance(built.index, RoarGraphIndex):
        yield from peer_methods(RoarGraphInFaiss(scene, built.index, built.build_cpu_s), scene)


def prepared_peer(peer: Peer, scene: Scene, cache: Path) -> Iterator[Method]:
    """The methods of a peer, read from the cache or built."""
    peer.prepare(cache, scene.label, scene.centred)
    yield from peer_methods(peer, scene)


def row_of(scene: Scene, method: Method, bandwidth: Bandwidth) -> dict[str, Any]:
    """Everything measured of one method at one width."""
    return {
        "data": scene.name,
        "keys": scene.keys,
        "method": method.name,
        "setting": method.setting,
        "recall": round(method.quality.recall, 4),
        "cold_ms": float(np.median(method.cold)) * 1e3,
        "warm_ms": float(np.median(method.warm)) * 1e3,
        "output_error": method.quality.output_error,
        "lse_error": method.quality.lse_error,
        "mass": method.quality.mass,
        "bytes_per_key": method.bytes_per_key,
        "build_cpu_s": method.build_cpu_s,
        "attends": method.attends,
        "sequential_gb_s": bandwidth.sequential * 1e-9,
        "gather_gb_s": bandwidth.gather * 1e-9,
        **method.extra,
    }


SHOWN = ("data", "keys", "method", "setting", "recall", "cold_ms", "warm_ms", "output_error",
         "lse_error", "mass", "bytes_per_key", "build_cpu_s")  # fmt: skip
"""Columns of the report; the others are in the details written beside it."""


@dataclass
class Plan:
    """What to run, and what was left out."""

    report: Report
    cache: Path
    kinds: list[str]
    peers: list[type[Peer]]
    quick: bool
    slow_up_to: int
    deadline: float

    def jobs(self, scene: Scene) -> Iterator[tuple[str, bool, Callable[[], Iterator[Method]]]]:
        """What to measure, the most telling first: name, whether its build takes minutes and may
        not be made now, and how to prepare it."""
        too_long = self.quick or scene.keys > self.slow_up_to
        peers = [peer(scene.keys, scene.centred.shape[1]) for peer in self.peers]
        for kind in sorted(self.kinds, key=lambda kind: kind not in FIRST_KINDS):
            cached = index_path(kind, scene, self.cache).exists()
            slow = kind in SLOW_KINDS and too_long and not cached
            if kind not in FIRST_KINDS:
                yield from self._peer_jobs(peers, scene, too_long)
                peers = []
            yield kind, slow, partial(prepared_kind, kind, scene, self.cache)
        yield from self._peer_jobs(peers, scene, too_long)

    def _peer_jobs(
        self, peers: list[Peer], scene: Scene, too_long: bool
    ) -> Iterator[tuple[str, bool, Callable[[], Iterator[Method]]]]:
        for peer in peers:
            slow = not peer.quick and too_long and not peer.path(self.cache, scene.label).exists()
            yield peer.name, slow, partial(prepared_peer, peer, scene, self.cache)

    def leaves_out(self, what: str, slow: bool) -> bool:
        """Notes and says that something is not measured, if so."""
        late = time.monotonic() > self.deadline
        if slow:
            self.report.skip(what, "its build takes minutes and it is not in the cache")
        elif late:
            self.report.skip(what, "the quick run's 50 s were spent")
        return slow or late


class Written:
    """The rows of all scenes, kept in a file beside the report while the run goes on."""

    def __init__(self, report: Path | None, resume: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self._path = report and report.with_name(f"{report.stem}-details.json")
        if resume and self._path is not None and self._path.exists():
            self.rows = json.loads(self._path.read_text())

    def has(self, data: str, keys: int) -> bool:
        """Whether a scene was measured."""
        return any((row["data"], row["keys"]) == (data, keys) for row in self.rows)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keeps the rows of a scene."""
        self.rows += rows
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(self.rows, indent=1) + "\n")


def use_one_blas_thread() -> None:
    """Start over with one BLAS thread: NumPy reads the variable when it is imported."""
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.retrieval", *sys.argv[1:]]
        os.execve(sys.executable, command, environment)


def main() -> None:
    """Command line."""
    use_one_blas_thread()
    parser = argument_parser("retrieval", __doc__ or "")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 128, 512, 1024], metavar="K",
                        help="keys, in units of 1024")  # fmt: skip
    parser.add_argument("--data", nargs="+", default=["structured", "hard"])
    parser.add_argument("--kinds", nargs="+", default=[k for k in INDEX_KINDS if k != "auto"])
    parser.add_argument("--peers", nargs="*", default=[peer.name for peer in PEERS])
    parser.add_argument("--steps", type=int, default=24, help="decode steps timed per method")
    parser.add_argument("--cache", type=Path, default=Path("bench-cache"))
    parser.add_argument("--resume", action="store_true",
                        help="keep the scenes that the file of --json has")  # fmt: skip
    parser.add_argument("--slow-up-to", type=int, default=1024, metavar="K",
                        help="build slow peers for at most this many keys")  # fmt: skip
    given = parser.parse_args()
    sizes, data, steps = given.sizes, given.data, given.steps
    kinds = given.kinds
    if given.quick:
        sizes, data, steps = [128], ["structured"], 8
        kinds = [kind for kind in kinds if kind in (*FIRST_KINDS, "roargraph")]
    kernel.set_threads(1)
    config: dict[str, Any] = {
        "sizes": [size * 1024 for size in sizes], "data": data, "steps": steps, "head_dim": 128,
        "group": 4, "dtype": "bfloat16", "threads": 1, "isa": kernel.isa(), "top": TOP,
    }  # fmt: skip
    report = Report("retrieval", config, quick=given.quick)
    deadline = time.monotonic() + 35 if given.quick else float("inf")
    peers = [peer for peer in PEERS if peer.name in given.peers]
    plan = Plan(report, given.cache, kinds, peers, given.quick, given.slow_up_to * 1024,
                deadline)  # fmt: skip
    written = Written(given.json, given.resume)
    with faiss_threads(1):
        for name in data:
            for size in sizes:
                if written.has(name, size * 1024):
                    continue
                scene = Scene(name, size * 1024, steps, given.cache)
                written.add(measure(scene, plan))
        if "structured" in data and KEYS // 1024 in sizes:
            measure_threads(Scene("structured", KEYS, steps, given.cache), report)
    for row in written.rows:
        report.add(**{column: row[column] for column in SHOWN})
    check_targets(report, written.rows)
    report.finish(given.json)
    if given.json is not None:
        from benchmarks.retrieval_plot import plot, plot_growth

        plot(written.rows, given.json.with_suffix(".png"))
        plot_growth(written.rows, given.json.with_name(f"{given.json.stem}-growth.png"))


if __name__ == "__main__":
    main()
