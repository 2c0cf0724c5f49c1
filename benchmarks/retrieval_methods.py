"""The methods of the retrieval benchmark: our kinds and the peers, each at the widths to time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.peers import BEAMS, Peer
from benchmarks.scene import TOP, Quality, Scene, build
from longreach.errors import FailedPrecondition
from longreach.types import BFLOAT16, Budget, PartialAttention, total_work
from retrieval_node.graph_kernel import SearchWidth, build_graph
from retrieval_node.index.base import Index
from retrieval_node.index.persistence import read_index, write_index
from retrieval_node.index.roargraph import RoarGraphIndex
from retrieval_node.index.roargraph_build import (
    SHAPE,
    exact_neighbours,
    group_queries,
    training_queries,
)

RECALLS = (0.90, 0.95, 0.97, 0.99)
ASKED = (100, 120, 150, 200, 300, 400, 600, 900, 1400)
"""Keys asked of our kinds, to reach a recall of the best 100: they have no other width."""
QUICKLY_BUILT = ("flat", "sketch")
"""Kinds that are built each time."""
TAIL_BUDGETS = ("top_k=100+tail", "mass=0.95[64,1024]+tail")


@dataclass
class Method:
    """A method at one width: how to run a step, what it costs and how good it is."""

    name: str
    setting: str
    run: Callable[[int], object]
    quality: Quality
    attends: bool
    bytes_per_key: float
    build_cpu_s: float
    extra: dict[str, float] = field(default_factory=dict)
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)


def peer_methods(peer: Peer, scene: Scene) -> Iterator[Method]:
    """The peer at the cheapest setting that reaches each recall."""

    def search(step: int, setting: int) -> np.ndarray:
        return peer.search(scene.queries[step, 0], setting)

    def run_at(setting: int) -> Callable[[int], object]:
        return lambda step: search(step, setting)

    def quality(setting: int) -> Quality:
        ids = np.array([search(step, setting) for step in range(scene.steps)])
        return scene.judge([list(each) for each in ids], scene.attention_over(ids))

    for setting, reached in cheapest(peer.settings, quality):
        yield Method(
            peer.name, str(setting), run_at(setting), reached, False, peer.bytes_per_key,
            peer.build_cpu_s
        )  # fmt: skip


def kind_methods(kind: str, built: Built, scene: Scene) -> Iterator[Method]:
    """One of our kinds at the fewest keys that reach each recall, and with a tail estimate."""
    index = built.index

    def method(budget: Budget) -> Method:
        return Method(
            kind,
            str(budget),
            attending(index, scene, budget),
            answers_quality(index, scene, budget),
            True,
            index.index_bytes / scene.keys,
            built.build_cpu_s,
            {"graph_cpu_s": built.graph_cpu_s, **work_of(index, scene, budget)},
        )

    if kind == "flat":
        yield method(Budget(exact=True))
        yield method(Budget(top_k=TOP))
        return
    if isinstance(index, RoarGraphIndex):
        yield from graph_methods(index, built, scene)
    else:
        widths = cheapest(ASKED, lambda k: answers_quality(index, scene, Budget(top_k=k)))
        for asked, _ in widths:
            yield method(Budget(top_k=asked))
    for text in TAIL_BUDGETS:
        yield method(Budget.parse(text))


def attending(index: Index, scene: Scene, budget: Budget) -> Callable[[int], object]:
    """Answers a step. Its rows are made before, as peers' queries are."""
    rows = [[scene.rows(step, budget)] for step in range(scene.steps)]
    scale = scene.work.scale
    return lambda step: index.attend(rows[step], scale)


def graph_methods(index: RoarGraphIndex, built: Built, scene: Scene) -> Iterator[Method]:
    """The graph at the narrowest beam that reaches each recall."""
    budget = Budget(top_k=TOP)

    def quality(beam: int) -> Quality:
        return answers_quality(index.with_width(SearchWidth(beam, 1.0)), scene, budget)

    for beam, reached in cheapest(BEAMS, quality):
        wide = index.with_width(SearchWidth(beam, 1.0))
        extra = {"graph_cpu_s": built.graph_cpu_s, **work_of(wide, scene, budget)}
        yield Method(
            "roargraph", f"beam={beam}", attending(wide, scene, budget), reached, True,
            index.index_bytes / scene.keys, built.build_cpu_s, extra
        )  # fmt: skip


def cheapest(
    settings: Sequence[int], quality: Callable[[int], Quality]
) -> Iterator[tuple[int, Quality]]:
    """For each recall the first setting that reaches it; the last setting when none does."""
    wanted = list(RECALLS)
    for setting in settings:
        reached = quality(setting)
        if reached.recall >= wanted[0] or setting == settings[-1]:
            yield setting, reached
        while wanted and reached.recall >= wanted[0]:
            wanted.pop(0)
        if not wanted:
            return


def answers_quality(index: Index, scene: Scene, budget: Budget) -> Quality:
    """Quality of an index's answers to every step."""
    answers = [
        index.attend([scene.rows(step, budget)], scene.work.scale, want_selected=True)[0]
        for step in range(scene.steps)
    ]
    partial = PartialAttention(
        np.concatenate([answer.partial.output[:, 0] for answer in answers]),
        np.concatenate([answer.partial.lse[:, 0] for answer in answers]),
    )
    return scene.judge([answer.selected[0][0] for answer in answers if answer.selected], partial)


def work_of(index: Index, scene: Scene, budget: Budget) -> dict[str, float]:
    """What the steps read, and how long their searches took (wall time of the kernel)."""
    answers = [
        index.attend([scene.rows(step, budget)], scene.work.scale)[0] for step in range(scene.steps)
    ]
    work = total_work([answer.work for answer in answers])
    rows = work.keys_scanned + work.keys_attended  # a key row each, a value row each
    codes = work.bytes_read - rows * scene.kv.row_bytes // 2
    return {
        "scan_fraction": work.scan_fraction,
        "sketch_fraction": work.sketch_fraction,
        "attended_fraction": work.attended_fraction,
        "bytes_fraction": work.bytes_fraction,
        "code_bytes": codes / work.keys_sketched if work.keys_sketched else 0.0,
        "scan_ms": float(np.median([answer.search_s for answer in answers])) * 1e3,
    }


@dataclass(frozen=True, slots=True)
class Built:
    """An index and the CPU seconds of its build; for graphs also without the exact neighbours."""

    index: Index
    build_cpu_s: float
    graph_cpu_s: float = 0.0


def index_path(kind: str, scene: Scene, cache: Path) -> Path:
    """Where a scene's index of a kind is kept."""
    shape = f"-{SHAPE.pivots}-{SHAPE.degree}-{SHAPE.build_beam}" if kind == "roargraph" else ""
    return cache / f"{kind}{shape}-{scene.label}.index"


def built_kind(kind: str, scene: Scene, cache: Path) -> Built:
    """An index of a kind; those that take long to build are kept on disk."""
    if kind in QUICKLY_BUILT:
        return Built(*build(kind, scene))
    path = index_path(kind, scene, cache)
    times = path.with_suffix(".json")
    try:
        kept = read_index(path, scene.kv, kind, {})
        return Built(kept, **json.loads(times.read_text()))
    except (FailedPrecondition, OSError, ValueError):
        made = build_roargraph(scene) if kind == "roargraph" else Built(*build(kind, scene))
        path.unlink(missing_ok=True)
        write_index(path, made.index, scene.kv, kind, {})
        seconds = {"build_cpu_s": made.build_cpu_s, "graph_cpu_s": made.graph_cpu_s}
        times.write_text(json.dumps(seconds))
        return made


def build_roargraph(scene: Scene) -> Built:
    """What the kind's build does, with the exact neighbours timed apart."""
    started = time.process_time()
    queries = training_queries(group_queries(scene.sample, 1, 0), scene.keys)
    neighbours = exact_neighbours(scene.centred, queries, 1, lambda: True)
    searched = time.process_time()
    assert neighbours is not None
    graph = build_graph(scene.centred.astype(BFLOAT16), neighbours, SHAPE, 1, lambda: True)
    finished = time.process_time()
    assert graph is not None
    return Built(RoarGraphIndex(scene.kv, [graph]), finished - started, finished - searched)
