"""`ood`: are queries out of the keys' distribution, and what does that cost a search?

First the Mahalanobis distance of decode queries to the distribution of keys, against that of keys
held out of it. Then recall of the best k keys against the share of keys read, for searches by
decode queries (Q→K) and by held-out keys (K→K), in ivf and hnsw, which are built from keys alone
(as stored and centred), and in roargraph, which prefill queries teach (RetrievalAttention, arXiv
2409.10516, section 2.4). Targets are the paper's figures for large models.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.report import Report
from evaluation.observations.heads import HeadGroup, Source, add_source_flags, source_of
from evaluation.observations.mahalanobis import Distances, compare
from evaluation.observations.reporting import Row, finish, mean_over, progress_bar, write_csv
from evaluation.observations.searches import (
    SEARCHERS,
    BaseSet,
    Point,
    Searcher,
    base_set,
    curve,
    exact_best,
    scanned_at,
)
from longreach.errors import InvalidRequest

HELD_OUT = 256
RECALL = 0.95
LONG = 262_144
"""Keys from which on the paper's 1 to 3% can be asked for: finding the best 100 keys in a graph
expands at least 100 of them, which alone is more than 3% of a shorter context."""

BY_QUERIES, BY_KEYS = "Q→K", "K→K"
PAPER_DISTANCE = 10.0
NAMES = tuple(searcher.name for searcher in SEARCHERS)


def add_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("ood", help="queries outside the keys' distribution, and searches")
    parser.description = __doc__
    add_source_flags(parser, n=32_768)
    parser.add_argument("--k", type=int, default=100, help="best keys searched for (default 100)")
    parser.add_argument(
        "--indexes",
        nargs="+",
        choices=NAMES,
        default=NAMES,
        help="which to search; graphs of 256K keys take minutes to build",
    )
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Measures and writes ood.json, .csv and .png, ood-distances.csv and .png."""
    from evaluation.observations.plots import plot_distances, plot_searches

    source = source_of(given)
    report = Report("ood", {**source.config, "k": given.k, "held_out": HELD_OUT, "recall": RECALL})
    searchers = [each for each in SEARCHERS if each.name in given.indexes]
    measured: list[tuple[Row, Distances]] = []
    with progress_bar() as progress:
        total = source.size * (1 + len(searchers))
        task = progress.add_task("making heads", total=total)
        begun = itertools.count()

        def stage(text: str) -> None:
            progress.update(task, description=text, completed=next(begun))

        for head in source.heads():
            stage(f"layer {head.layer}, KV head {head.kv_head}: distances")
            base = base_of(head, given.k)
            measured.append(distances_of(head, base))
            report.results += search_rows(head, base, given.k, searchers, stage)
        progress.update(task, completed=total)
    summary = summary_rows(report.results)
    distances = [row for row, _ in measured]
    check_targets(report, distances, summary)
    given.out.mkdir(parents=True, exist_ok=True)
    write_csv(distances, given.out / "ood-distances.csv")
    tables = {"Mahalanobis distances": distances, f"keys read at recall {RECALL}": summary}
    finish(report, given.out, tables, note_on(source, distances))
    plot_searches(report.results, given.out / "ood.png")
    plot_distances(measured, given.out / "ood-distances.png")


def base_of(head: HeadGroup, k: int) -> BaseSet:
    """What is searched; raises InvalidRequest for too few keys to say anything."""
    if len(head.keys) < max(1024, 4 * k):
        raise InvalidRequest(
            f"{len(head.keys)} keys in the context; searching for {k} needs at least "
            f"{max(1024, 4 * k)}: use a longer context or a smaller --k"
        )
    return base_set(head, min(HELD_OUT, len(head.keys) // 4))


def distances_of(head: HeadGroup, base: BaseSet) -> tuple[Row, Distances]:
    """How far the group's decode queries lie from the keys; the row to report and the distances."""
    # Distances are from the keys as stored, not as centred for search.
    keys = np.asarray(base.kv.keys[0], np.float32)
    held = base.held_out + (keys[:1] - base.centred[:1])
    dim = keys.shape[1]
    found = compare(keys, held, head.decode_queries.reshape(-1, dim))
    row: Row = {
        "layer": head.layer,
        "kv_head": head.kv_head,
        "keys": len(keys),
        "key_distance": float(found.keys.mean()),
        "query_distance": float(found.queries.mean()),
        "ratio": found.ratio,
        "ratio_at_equal_length": found.ratio_at_equal_length,
    }
    return row, found


def search_rows(
    head: HeadGroup,
    base: BaseSet,
    k: int,
    searchers: Sequence[type[Searcher]],
    stage: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """One row for each index, kind of query and effort."""
    dim = base.centred.shape[1]
    queries = {BY_QUERIES: head.decode_queries.reshape(-1, dim), BY_KEYS: base.held_out}
    queries = {search: np.ascontiguousarray(each) for search, each in queries.items()}
    truth = {search: exact_best(base, each, k) for search, each in queries.items()}
    rows: list[Row] = []
    for kind in searchers:
        stage(f"layer {head.layer}, KV head {head.kv_head}: {kind.name}")
        searcher = kind(base)
        for search, each in queries.items():
            points = curve(searcher, len(base.centred), each, truth[search])
            rows += [_row(head, base, kind.name, search, point) for point in points]
    return rows


def _row(head: HeadGroup, base: BaseSet, index: str, search: str, point: Point) -> Row:
    return {
        "layer": head.layer,
        "kv_head": head.kv_head,
        "keys": len(base.centred),
        "index": index,
        "search": search,
        "effort": point.effort,
        "recall": point.recall,
        "scan_fraction": point.scanned,
    }


def summary_rows(rows: Sequence[Row]) -> list[Row]:
    """For each head, index and kind of query the share of keys read at a recall of RECALL (1 where
    it is not reached) and the highest recall reached."""
    by = ("layer", "kv_head", "keys", "index", "search")
    curves: dict[tuple[Any, ...], list[Point]] = {}
    for row in rows:
        point = Point(row["effort"], row["recall"], row["scan_fraction"])
        curves.setdefault(tuple(row[name] for name in by), []).append(point)
    return [
        dict(zip(by, key, strict=True))
        | {
            "scan_fraction_at_recall": scanned_at(points, RECALL),
            "recall_reached": max(point.recall for point in points),
        }
        for key, points in curves.items()
    ]


def check_targets(report: Report, distances: Sequence[Row], summary: Sequence[Row]) -> None:
    """The paper's figures, over the mean of all heads measured."""
    ratio = float(np.mean([row["ratio"] for row in distances]))
    report.at_least("Mahalanobis distance of queries over that of keys", PAPER_DISTANCE, ratio, "x")
    equal = float(np.mean([row["ratio_at_equal_length"] for row in distances]))
    report.at_least("the same at equal length", PAPER_DISTANCE, equal, "x")
    read = {
        row["index"]: 100 * row["scan_fraction_at_recall"]
        for row in mean_over(
            [row for row in summary if row["search"] == BY_QUERIES],
            ("index",),
            ("scan_fraction_at_recall",),
        )
    }
    keys = min(row["keys"] for row in distances)
    what = f"keys read by queries at recall {RECALL}"
    for name in ("ivf-raw", "hnsw-raw"):
        if name in read:
            report.at_least(f"{name}: {what}", 30, read[name], "%", "the paper says 30 to 50%")
    if "roargraph" in read and keys + HELD_OUT >= LONG:
        report.at_most(f"roargraph: {what}", 3, read["roargraph"], "%", "the paper says 1 to 3%")
    else:
        report.skip(
            "the 1 to 3% of keys that roargraph reads",
            f"needs roargraph and at least {LONG} keys, {keys} were searched (--n {LONG})",
        )


def note_on(source: Source, distances: Sequence[Row]) -> str:
    """What a reader must know of this source before reading the figures."""
    ratio = float(np.mean([row["ratio"] for row in distances]))
    if source.dump is None:
        return (
            "Synthetic keys and queries (benchmarks/synthetic.py): they have the statistics of "
            "real heads by construction and prove nothing about a particular model; dump one."
        )
    if ratio >= PAPER_DISTANCE:
        return ""
    return (
        f"The queries of {source.dump.header['model']} lie {ratio:.2g} times as far from the keys "
        "as keys do; RetrievalAttention reports more than 10 times for large models. A small model "
        "such as the demo model shows the effect only weakly: its figures say little about which "
        "index a large model needs. Dump a large model for that."
    )
