"""What the retrieval benchmark must reach, as ratios within one run."""

from __future__ import annotations

from typing import Any

from benchmarks.report import Report

DEFAULT_KIND = "sketch"
KEYS = 131_072
BETTER_THAN = {
    0.95: {"faiss Flat": 37, "faiss IVF": 6.8, "faiss HNSW32": 10.5, "hnswlib": 10.5,
           "faiss PQ64x4fs+refine": 5.4},
    0.99: {"faiss Flat": 30, "faiss IVF": 10, "faiss HNSW32": 18, "hnswlib": 18,
           "faiss PQ64x4fs+refine": 6.9},
}  # fmt: skip
"""How many times faster than a peer the default kind answers, cold, at equal recall or better."""

GROWTH_RECALL = 0.95

Row = dict[str, Any]


def check_targets(report: Report, measured: list[Row]) -> None:
    """Add every target that has been measured."""
    rows = [row for row in measured if row["keys"] == KEYS]
    structured = [row for row in rows if row["data"] == "structured"]
    hard = [row for row in rows if row["data"] == "hard"]
    _speed(report, structured)
    _quality(report, structured)
    _bandwidth(report, structured)
    _size_and_build(report, structured)
    _graph(report, structured)
    _hard(report, hard)
    _growth(report, [row for row in measured if row["data"] == "structured"])


def fastest(rows: list[Row], method: str, recall: float) -> Row | None:
    """The method's fastest row that reaches a recall, without a tail estimate."""
    able = [
        row
        for row in rows
        if row["method"] == method and row["recall"] >= recall and "tail" not in row["setting"]
    ]
    return min(able, key=lambda row: float(row["cold_ms"]), default=None)


def _speed(report: Report, rows: list[Row]) -> None:
    for recall, peers in BETTER_THAN.items():
        ours = fastest(rows, DEFAULT_KIND, recall)
        for name, times in peers.items():
            peer = fastest(rows, name, recall)
            if ours is None or peer is None:
                continue
            report.at_least(
                f"{DEFAULT_KIND} over {name} at recall {recall}",
                times,
                peer["cold_ms"] / ours["cold_ms"],
                "x",
                f"{peer['cold_ms']:.3g} ms against {ours['cold_ms']:.3g} ms",
            )


def _quality(report: Report, rows: list[Row]) -> None:
    estimated = [row for row in rows if row["method"] == DEFAULT_KIND and "tail" in row["setting"]]
    best = min(estimated, key=lambda row: float(row["cold_ms"]), default=None)
    if best is None:
        return
    note = f"{best['setting']}, {best['cold_ms']:.3g} ms"
    report.at_most("output error with tail estimate", 0.05, best["output_error"], "", note)
    report.at_most("LSE error with tail estimate", 0.03, best["lse_error"], "", note)


def _bandwidth(report: Report, rows: list[Row]) -> None:
    exact = fastest([row for row in rows if row["setting"] == "exact"], "flat", 0.0)
    if exact is not None:
        rate = KEYS * 512 / (exact["cold_ms"] * 1e-3) * 1e-9
        share = 100 * rate / exact["sequential_gb_s"]
        report.at_least("exact attention, of sequential bandwidth", 75, share, "%")
    ours = fastest(rows, DEFAULT_KIND, 0.95)
    if ours is not None and ours["scan_ms"] > 0:
        rate = KEYS * ours["code_bytes"] / (ours["scan_ms"] * 1e-3) * 1e-9
        share = 100 * rate / ours["sequential_gb_s"]
        note = "codes read over the time to the list of candidates, exact scoring included"
        report.at_least("sketch scan, of sequential bandwidth", 60, share, "%", note)


def _size_and_build(report: Report, rows: list[Row]) -> None:
    ours = fastest(rows, DEFAULT_KIND, 0.0)
    if ours is not None:
        report.at_most("index size", 36, ours["bytes_per_key"], "bytes/key")
        report.at_most("build of one KV head", 100, ours["build_cpu_s"] * 1e3, "ms CPU")


def _graph(report: Report, rows: list[Row]) -> None:
    graph, peer = fastest(rows, "roargraph", 0.0), fastest(rows, "hnswlib", 0.0)
    if graph is not None and peer is not None:
        share = graph["graph_cpu_s"] / peer["build_cpu_s"]
        report.at_most("roargraph build over hnswlib's, without exact neighbours", 0.5, share, "x")
    for recall in (0.90, 0.95, 0.99):
        graph = fastest(rows, "roargraph", recall)
        peer = fastest(rows, "roargraph in faiss", recall)
        if graph is not None and peer is not None:
            share = graph["cold_ms"] / peer["cold_ms"]
            name = f"roargraph search over the same graph in faiss at recall {recall}"
            report.at_most(name, 0.7, share, "x", "ours attends too")


def _hard(report: Report, rows: list[Row]) -> None:
    exact = fastest([row for row in rows if row["setting"] == "exact"], "flat", 0.0)
    ours = fastest(rows, DEFAULT_KIND, 0.97)
    if exact is None:
        return
    if ours is None:
        most = max((row["recall"] for row in rows if row["method"] == DEFAULT_KIND), default=0.0)
        report.at_least("recall on the hard set", 0.97, most, "")
        return
    share = ours["cold_ms"] / exact["cold_ms"]
    note = f"recall {ours['recall']:.3f}"
    report.at_most("hard set at recall .97, of full attention's time", 0.25, share, "x", note)


def _growth(report: Report, rows: list[Row]) -> None:
    """Beyond KEYS, the time of our fastest kind must grow slower than the number of keys."""
    best: dict[int, Row] = {}
    for size in {row["keys"] for row in rows}:
        here = [row for row in rows if row["keys"] == size]
        found = [fastest(here, kind, GROWTH_RECALL) for kind in ("sketch", "roargraph")]
        able = [row for row in found if row is not None]
        if able:
            best[size] = min(able, key=lambda row: float(row["cold_ms"]))
    if KEYS not in best:
        return
    for size in sorted(size for size in best if size > KEYS):
        base, there = best[KEYS], best[size]
        report.at_most(
            f"time at {size} keys over time at {KEYS}, recall {GROWTH_RECALL}",
            size / KEYS,
            there["cold_ms"] / base["cold_ms"],
            "x",
            f"{there['method']} {there['cold_ms']:.3g} ms, {base['method']} "
            f"{base['cold_ms']:.3g} ms; the keys grow {size // KEYS}-fold",
        )
