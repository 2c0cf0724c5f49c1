"""The tour with the demo model: right answers twice, the second time over the stored document."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longreach.quickstart.document import FACTS

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def _tour(directory: Path, *flags: str) -> dict[str, Any]:
    """Runs the tour over a document of 12,000 tokens; returns its report."""
    command = [sys.executable, "-m", "longreach.quickstart", "--document-tokens", "12000"]
    command += ["--data-dir", str(directory / "data"), "--report", str(directory / "report.json")]
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return report


def test_the_tour_finds_every_fact_and_a_second_run_finds_the_document(tmp_path: Path) -> None:
    first = _tour(tmp_path, "--verify")
    assert [each["answer"] for each in first["answers"]] == [fact.answer for fact in FACTS]
    assert all(each["full_attention_answer"] == each["answer"] for each in first["answers"])
    assert first["document_tokens"] > 12_000
    assert first["coverage"] == 1.0
    assert first["resident_kv_bytes"] < first["full_kv_bytes"] / 8
    assert 0 < first["attended_fraction"] < 0.1
    assert not first["found"]

    second = _tour(tmp_path)
    assert second["found"]
    assert second["context_id"] == first["context_id"]
    assert [each["answer"] for each in second["answers"]] == [fact.answer for fact in FACTS]
    assert all("full_attention_answer" not in each for each in second["answers"])
