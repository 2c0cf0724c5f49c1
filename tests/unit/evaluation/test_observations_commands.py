"""The commands end to end: files, tables, targets and notes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.observations.__main__ import main

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def dump(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dump")
    model = str(tiny_model("llama"))
    flags = ["--tokens", "1600", "--decode", "16", "--queries", "256"]
    assert main(["dump", "--model", model, *flags, "--out", str(out)]) == 0
    return out


def measured(command: list[str], out: Path) -> dict[str, Any]:
    """Runs a command and reads its JSON."""
    assert main([*command, "--out", str(out)]) == 0
    assert (out / f"{command[0]}.png").read_bytes().startswith(PNG)
    content: dict[str, Any] = json.loads((out / f"{command[0]}.json").read_text())
    assert content["machine"]["cores"] >= 1
    assert "commit" in content
    with (out / f"{command[0]}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(content["results"])
    return content


def test_sparsity_of_a_dump_has_a_row_for_each_layer_head_and_k(dump: Path, tmp_path: Path) -> None:
    content = measured(["sparsity", "--dump", str(dump), "--k", "10", "100"], tmp_path)
    found = {(row["layer"], row["q_head"], row["k"]) for row in content["results"]}
    assert found == {(layer, head, k) for layer in range(3) for head in range(4) for k in (10, 100)}
    assert content["config"]["model"].startswith("tiny-llama")


def test_dynamics_of_chosen_heads_are_written_step_by_step(dump: Path, tmp_path: Path) -> None:
    chosen = ["--layers", "1", "--kv-heads", "0"]
    content = measured(["dynamics", "--dump", str(dump), *chosen, "--k", "32"], tmp_path)
    assert {(row["layer"], row["q_head"]) for row in content["results"]} == {(1, 0), (1, 1)}
    with (tmp_path / "dynamics-steps.csv").open() as file:
        steps = {int(row["step"]) for row in csv.DictReader(file)}
    assert steps == set(range(16))


def test_ood_of_a_synthetic_source_reports_targets_and_what_it_left_out(tmp_path: Path) -> None:
    flags = ["--source", "synthetic:flat", "--n", "2048", "--k", "10", "--steps", "8"]
    content = measured(["ood", *flags], tmp_path)
    names = [target["name"] for target in content["targets"]]
    assert names[0].startswith("Mahalanobis")
    assert names[1] == "the same at equal length"
    assert [name.split(":")[0] for name in names[2:]] == ["ivf-raw", "hnsw-raw"]
    assert "262144" in content["skipped"][0]["why"]
    assert "Synthetic" in content["note"]
    assert {row["search"] for row in content["results"]} == {"Q→K", "K→K"}
    assert (tmp_path / "ood-distances.png").read_bytes().startswith(PNG)


def test_ood_of_a_small_model_says_that_it_shows_the_effect_weakly(
    dump: Path, tmp_path: Path
) -> None:
    flags = ["--layers", "2", "--kv-heads", "1", "--k", "10", "--indexes", "ivf"]
    content = measured(["ood", "--dump", str(dump), *flags], tmp_path)
    assert "only weakly" in content["note"]
    assert {row["index"] for row in content["results"]} == {"ivf"}


def test_too_few_keys_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sparsity", "--n", "100", "--out", str(tmp_path)]) == 2
    assert "--n 100 keys" in capsys.readouterr().err
    assert main(["ood", "--n", "2048", "--k", "1000", "--out", str(tmp_path)]) == 2
    assert "searching for 1000 needs at least 4000" in capsys.readouterr().err
