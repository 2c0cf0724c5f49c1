"""The tour's report: the promised keys, honest aggregates, and a wrong answer that shows."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from longreach.quickstart.report import Answer, Report
from longreach.sdk import Context, Generation, Timing, Usage, Work
from longreach.types import ShardMap

PROMISED = {
    "document_tokens", "answers", "ingest_s", "index_ready_s", "ttft_s", "time_per_token_ms",
    "scan_fraction", "sketch_fraction", "attended_fraction", "bytes_fraction", "coverage",
    "resident_kv_bytes", "full_kv_bytes", "nodes",
}  # fmt: skip


def _answer(text: str, expected: str, *, scale: int = 1, full: str | None = None) -> Answer:
    generation = Generation(
        request_id="r",
        text=text,
        tokens=(),
        finish_reason="stop",
        usage=Usage(100_000, 20, 4),
        timing=Timing(first_token_s=0.1, per_token_s=0.01 * scale),
        work=Work(1000 * scale, 100, 1000 * scale, 50, 3000, 10_000 * scale, 1000 * scale),
        prompt_work=Work(),
        coverage=1.0 if scale == 1 else 0.75,
        resident_kv_bytes=10 * scale,
        full_kv_bytes=1000,
        worker_id="worker-0",
    )
    return Answer("Q", expected, generation, float(scale), full)


def _report(*answers: Answer) -> Report:
    context = Context(
        id="ctx-1", name="quickstart", model="demo", state="ready", tokens=100_001, kv_bytes=5,
        prefill_fraction=1.0, index_fraction=1.0, index_kind="graph", index_bytes=7,
        created_at=0.0, prefill_s=1.0, shard_map=ShardMap((), {}, "layer", "two nodes"),
    )  # fmt: skip
    return Report(context, "documentation", 3.0, 4.0, answers, nodes=2)


def test_the_report_has_the_promised_keys_with_medians_sums_and_minima() -> None:
    told = _report(
        _answer(" 1", "1"), _answer(" 2", "2", scale=2), _answer(" 3", "3", scale=3)
    ).as_json()
    assert set(told) >= PROMISED
    assert told["ttft_s"] == 2.0
    assert told["time_per_token_ms"] == pytest.approx(20.0)
    assert told["scan_fraction"] == pytest.approx(300 / 6000)
    assert told["bytes_fraction"] == pytest.approx(9000 / 60_000)
    assert told["coverage"] == 0.75
    assert told["resident_kv_bytes"] == 30
    assert told["nodes"] == 2
    assert [answer["answer"] for answer in told["answers"]] == ["1", "2", "3"]
    assert all("full_attention_answer" not in answer for answer in told["answers"])


def test_one_wrong_answer_makes_the_report_wrong() -> None:
    assert _report(_answer(" 1", "1"), _answer(" 2", "2")).right
    assert not _report(_answer(" 1", "1"), _answer(" 3", "2")).right


def test_an_answer_given_while_the_index_was_building_counts_too() -> None:
    report = _report(_answer(" 1", "1"))
    right = dataclasses.replace(report, early=_answer(" 1", "1"))
    wrong = dataclasses.replace(report, early=_answer(" 7", "1"))
    assert right.right
    assert not wrong.right
    assert wrong.as_json()["answered_while_indexing"]["answer"] == "7"
    assert "answered_while_indexing" not in report.as_json()


def test_an_answer_that_full_attention_does_not_give_is_wrong() -> None:
    assert _answer(" 1", "1", full="1").right
    assert not _answer(" 1", "1", full="7").right
    assert _answer(" 1", "1", full="1").as_json()["full_attention_answer"] == "1"


def test_the_file_and_the_table_tell_the_same(tmp_path: Path) -> None:
    report = _report(_answer(" 1", "1"), _answer(" 3", "2"))
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report.as_json()
    printed = io.StringIO()
    report.print(Console(file=printed, width=160))
    shown = printed.getvalue()
    assert "right" in shown
    assert "WRONG" in shown
    assert "100,001 tokens" in shown
    assert "10.000% of the keys in scope" in shown


def test_a_found_document_is_said_to_be_found() -> None:
    report = _report(_answer(" 1", "1"))
    found = dataclasses.replace(report, context=dataclasses.replace(report.context, found=True))
    printed = io.StringIO()
    found.print(Console(file=printed, width=160))
    assert "found again in 3.0 s" in printed.getvalue()
    assert found.as_json()["found"] is True
