from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from benchmarks.report import Report
from evaluation.pairing import pair_with_full
from evaluation.plots import needle_grid, write_plots
from evaluation.report import fill_report, summary
from evaluation.results import Record
from evaluation.tables import markdown, short_length
from longreach.types import WorkFigures

WORK = WorkFigures(
    keys_in_scope=1000, keys_scanned=20, keys_sketched=500, keys_attended=10,
    bytes_read=70, bytes_in_scope=1000, keys_covered=1000,
)  # fmt: skip


def record(method: str, score: float, haystack: int, **other: Any) -> Record:
    fields: dict[str, Any] = {
        "task": "niah_single_1", "suite": "ruler", "length": 4096, "question": 0, "questions": 1,
        "answer": "", "references": ("1",), "context_tokens": 4000, "generated_tokens": 4,
        "seconds": 0.5, "metadata": {}, "work": None if method == "full" else WORK,
        "resident_share": 1.0 if method == "full" else 0.25,
    }  # fmt: skip
    return Record(method=method, score=score, haystack=haystack, **{**fields, **other})


def filled(records: list[Record]) -> Report:
    report = Report("evaluation", {"model": "tiny (0123)", "seed": 0})
    fill_report(report, records)
    return report


def both(n: int, worse: int) -> list[Record]:
    full = [record("full", 1.0, i) for i in range(n)]
    return full + [record("cluster:top_k=1", float(i >= worse), i) for i in range(n)]


def test_a_row_has_score_difference_and_all_four_work_figures() -> None:
    full, own = filled(both(40, 2)).results
    assert (full["score"], full["n"]) == (100.0, 40)
    assert "difference" not in full
    assert (own["score"], own["difference"], own["worse"], own["better"]) == (95.0, -5.0, 2, 0)
    assert own["difference_low"] < -5 < own["difference_high"]
    figures = [own[name + "_fraction"] for name in ("scan", "sketch", "attended", "bytes")]
    assert figures == [0.02, 0.5, 0.01, 0.07]
    assert own["resident_share"] == 0.25


def test_only_questions_that_both_answered_are_compared() -> None:
    records = [
        record("full", 1.0, 0),
        record("cluster:exact", 0.0, 0),
        record("cluster:exact", 1.0, 1),
    ]
    full = {r.key[1:]: r for r in records if r.method == "full"}
    paired = pair_with_full([r for r in records if r.method != "full"], full)
    assert paired is not None
    assert (paired.n, paired.difference) == (1, -1.0)
    assert pair_with_full(records, {}) is None


def test_the_table_has_methods_down_and_tasks_across_with_n() -> None:
    records = [*both(40, 2), record("full", 0.5, 0, task="vt")]
    text = markdown(filled(records), records)
    assert "| method | niah_single_1 | vt | average |" in text
    assert "| full | 100.0 (40) | 50.0 (1) | 75.0 (41) |" in text
    assert "| cluster:top_k=1 | 95.0 (40) |  |  |" in text, "no average where a task is missing"
    assert "- model: tiny (0123)" in text
    assert "2.00% | 50.00% | 1.00% | 7.00%" in text


def test_rulers_effective_length_ends_before_the_first_that_scores_too_little() -> None:
    scores = {4096: 1.0, 8192: 0.9, 16_384: 0.8, 32_768: 1.0}
    records = [record("full", score, 0, length=length) for length, score in scores.items()]
    records += [record("cluster:exact", 0.5, 0)]
    text = markdown(filled(records), records)
    assert "(average at least 85.6): full: 8K; cluster:exact: none." in text


def test_a_terminal_summary_keeps_the_figures_that_belong_together() -> None:
    rows = summary(filled(both(40, 2))).results
    assert rows[1]["difference [95%]"].startswith("-5.0 [")
    assert rows[1]["attended"] == "1.00%"
    assert rows[0]["attended"] == ""


def needles() -> list[Record]:
    return [
        record("full", score, i, task="needle", suite="needle", length=n, metadata={"depth": depth})
        for n in (4096, 8192)
        for depth in (0.0, 1.0)
        for i, score in enumerate((1.0, depth))
    ]


def test_the_heatmap_holds_the_mean_of_every_cell() -> None:
    grid = needle_grid(needles())
    assert grid == {(0.0, 4096): 50.0, (0.0, 8192): 50.0, (1.0, 4096): 100.0, (1.0, 8192): 100.0}


def test_plots_and_csv_are_written_for_what_was_measured(tmp_path: Path) -> None:
    written = {path.name for path in write_plots(needles(), tmp_path / "run")}
    assert written == {"run.needle.full.csv", "run.needle.full.png", "run.needle.png"}
    for name in written - {"run.needle.full.csv"}:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "run.needle.full.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["depth", "length", "score"]
    assert rows[1] == ["0.0000", "4096", "50.00"]
    assert len(rows) == 5


def test_one_length_makes_no_curve(tmp_path: Path) -> None:
    assert write_plots(both(3, 1), tmp_path / "run") == []


def test_lengths_are_shown_in_k_where_they_are_whole() -> None:
    assert [short_length(n) for n in (4096, 131_072, 5000)] == ["4K", "128K", "5000"]
