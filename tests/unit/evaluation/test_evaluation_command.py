"""`longreach eval` on a tiny random model: its files, going on, and wrong flags."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.methods import parse_methods
from evaluation.tasks import TASKS
from longreach.cli.__main__ import main

TinyModel = Callable[[str], Path]


@pytest.fixture
def evaluate(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Runs `longreach eval` with full attention only; gives the JSON of the report."""

    def run(*more: str) -> dict[str, Any]:
        path = tmp_path / "out" / "run.json"
        flags = [
            "--model",
            str(tiny_model("llama")),
            "--methods",
            "full",
            "--n",
            "1",
            "--jobs",
            "1",
        ]
        words = ["eval", *flags, "--json", str(path), *more]
        monkeypatch.setattr(sys, "argv", ["longreach", *words])
        assert main(words) == 0
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    return run


def test_a_run_writes_all_files_and_goes_on_where_it_was(
    evaluate: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tasks = ("--tasks", "passkey", "number_string")
    results = evaluate(*tasks, "--lengths", "1K")["results"]
    assert {(row["task"], row["length"], row["n"]) for row in results} == {
        ("passkey", 1024, 1),
        ("number_string", 1024, 1),
    }
    lines = (tmp_path / "out" / "run.jsonl").read_text().splitlines()
    longer = evaluate(*tasks, "--lengths", "1024", "1500")
    kept = (tmp_path / "out" / "run.jsonl").read_text().splitlines()
    assert kept[: len(lines)] == lines
    assert len(longer["results"]) == 4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("run.json", "run.jsonl", "run.md", "run.infinitebench.png"),
    }


def test_the_file_holds_what_repeats_the_run(evaluate: Callable[..., dict[str, Any]]) -> None:
    report = evaluate("--tasks", "passkey", "--lengths", "1K", "--seed", "7")
    config = report["config"]
    assert config["command"].startswith("longreach eval --model")
    assert config["command"].endswith("--tasks passkey --lengths 1K --seed 7")
    assert config["methods"] == ["full"]
    assert (config["n"], config["seed"], config["lengths"]) == (1, 7, [1024])
    assert config["greedy"] is True
    assert "CPython" in config["essay"]
    assert report["machine"]["versions"]["torch"]
    names = [target["name"] for target in report["targets"]]
    assert names == ["time of the whole report"]


def test_wrong_words_end_with_a_message(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["eval", "--model", str(tiny_model("llama")), "--json", str(tmp_path / "run.json")]
    for more, message in (
        (["--tasks", "haystack"], "unknown task 'haystack'"),
        (["--methods", "sparse"], "unknown method 'sparse'"),
        (["--tasks", "needle", "qa_1"], "pass its file with --squad"),
        (["--json", "a.json", "b.json"], "--json names 2"),
    ):
        assert main([*flags, *more]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*flags, "--lengths", "4M"])
    assert "'4M' is not a length; write 4096 or 4K" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "nothing is written before the flags are right"


def test_help_teaches_by_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    text = capsys.readouterr().out
    for flag in ("--tasks", "--lengths", "--methods", "--quick", "--page", "--infinitebench"):
        assert flag in text
    assert "cluster/hnsw:top_k=100" in text
    parse_methods(["full", "cluster:exact", "cluster/hnsw:top_k=100", "cluster:mass=0.98[64,4096]"])


def test_the_list_names_every_task_and_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list"]) == 0
    text = capsys.readouterr().out
    for name in (*TASKS, "full", "cluster/INDEX:BUDGET", "hnsw", "flat"):
        assert name in text
