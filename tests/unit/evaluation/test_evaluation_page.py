"""The page of results from reports' JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.defaults import DEFAULT_METHOD
from evaluation.page import write_page
from longreach.errors import InvalidRequest

STREAMING = "local/streaming_llm:sink=128,window=512"


def row(method: str, length: int, score: float, **more: Any) -> dict[str, Any]:
    made = {
        "method": method, "suite": "mixed_haystack", "length": length, "n": 200, "score": score,
        "score_low": score - 1, "score_high": min(100.0, score + 1),
    }  # fmt: skip
    if method != "full":
        made |= {
            "difference": score - 90, "difference_low": score - 93, "difference_high": score - 88,
            "better": 0, "worse": 2, "paired_n": 200, "scan_fraction": 0.02,
            "sketch_fraction": 1.0, "attended_fraction": 0.01, "bytes_fraction": 0.1,
        }  # fmt: skip
    return made | more


def report(**changes: Any) -> dict[str, Any]:
    pooled = [
        row(method, length, score)
        for length in (4096, 131_072)
        for method, score in (("full", 90.0), (DEFAULT_METHOD, 89.5), (STREAMING, 40.0))
    ]
    results = [{**each, "task": "mixed/kv"} for each in pooled]
    diffuse = {
        "suite": "diffuse", "task": "diffuse", "method": STREAMING, "length": 4096, "n": 64,
        "output_error": 0.8, "keys_read": 640.0, "scan_fraction": 0.15, "sketch_fraction": 0.0,
        "attended_fraction": 0.15, "bytes_fraction": 0.15,
    }  # fmt: skip
    target = {
        "name": "answers lost", "target": "<= 1", "measured": 2.0, "unit": "answers",
        "met": False, "note": "n 200",
    }  # fmt: skip
    return {
        "benchmark": "evaluation",
        "config": {
            "command": "longreach eval --n 2",
            "ended": "today",
            "model": "demo (01)",
            "n": 2,
        },
        "machine": {"cpu": "a CPU", "cores": 2, "cpu_steal_share": 0.25},
        "commit": "abc",
        "results": [*results, diffuse],
        "pooled": pooled,
        "targets": [target],
        "skipped": [{"what": "the rest", "why": "time"}],
        "needle": {"full": [[0.0, 4096, 100.0], [1.0, 4096, 0.0]]},
    } | changes


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page and its pictures."""
    folder = tmp_path_factory.mktemp("docs")
    path = folder / "run.json"
    path.write_text(json.dumps(report()))
    write_page([path], folder / "results.md")
    return folder


@pytest.fixture
def page(docs: Path) -> str:
    return (docs / "results.md").read_text()


def test_it_says_what_was_run_where_and_by_which_command(page: str) -> None:
    assert "`longreach eval --n 2`" in page
    assert "at abc on a CPU, 2 cores, 25% of the CPU time stolen" in page
    assert "model demo (01); n 2." in page


def test_scores_stand_with_their_n_and_differences_with_their_interval(page: str) -> None:
    assert "| method | 4K | 128K |" in page
    assert "| full | 90.0 (200) | 90.0 (200) |" in page
    assert f"| {DEFAULT_METHOD} | mixed_haystack | 128K | 200 | -0.5 [-3.5, 1.5] | 0 | 2 |" in page


def test_what_loses_is_listed_with_how_much_and_what_may_be_chance_is_not(page: str) -> None:
    losses = page.split("## What loses")[1].split("## ")[0]
    assert STREAMING in losses
    assert "-50.0 [-53.0, -48.0] of full attention's 90.0, n 200; most on mixed/kv -50.0" in losses
    assert DEFAULT_METHOD not in losses


def test_missed_targets_and_what_was_left_out_are_said(page: str) -> None:
    assert "| answers lost | <= 1 answers | 2 | **no** | n 200 |" in page
    assert "- Not decided: the rest (time)." in page


def test_published_figures_stand_beside_ours(page: str) -> None:
    published = page.split("## Beside the published figures")[1]
    assert "| full attention | 78.7 | 90.0 (200), full on mixed_haystack at 128K |" in published
    assert f"| StreamingLLM | 35.0 | 40.0 (200), {STREAMING}" in published
    assert "| Quest | 60.5 | not run |" in published
    assert "Why they differ:" in published


def test_the_diffuse_head_is_a_table_of_errors(page: str) -> None:
    assert f"| {STREAMING} | 4K | 0.8000 | 640 | 15.00% |" in page


def test_every_picture_of_the_page_exists(page: str, docs: Path) -> None:
    pictures = [line.split("](")[1][:-1] for line in page.splitlines() if line.startswith("![")]
    assert pictures == [
        "results/mixed_haystack.png",
        "results/mixed_haystack-budgets.png",
        "results/needle-full.png",
    ]
    for name in pictures:
        assert (docs / name).read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for text, message in (("{", "cannot read"), ('{"benchmark": "rpc"}', "is not a report")):
        path.write_text(text)
        with pytest.raises(InvalidRequest, match=message):
            write_page([path], tmp_path / "page.md")
