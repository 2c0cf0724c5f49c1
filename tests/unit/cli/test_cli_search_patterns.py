"""`longreach search-patterns`: the file it writes, where it goes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.encoding import load_encoder
from evaluation.pattern_search import calibration_prompt
from gpu_worker.model import load_model
from gpu_worker.patterns.per_head import MInference
from gpu_worker.patterns.spec import pattern_for_model
from longreach.cli.__main__ import main
from tests.tiny_models import save_byte_tokenizer
from tests.unit.gpu_worker.worker_models import random_module

SMALL = ["--tokens", "1024", "--chunk-rows", "256", "--chunks", "2", "--repeats", "1"]
DEMO = Path(__file__).parents[3] / "models" / "demo"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    random_module("llama", num_hidden_layers=2).save_pretrained(directory)
    save_byte_tokenizer(directory)
    return directory


def test_the_file_lands_in_the_models_directory_and_serves_it(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search-patterns", "--model", str(model), *SMALL]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(model / "patterns.json")
    assert "8 heads" in printed.err
    written = json.loads((model / "patterns.json").read_text())
    assert written["calibration"] == {"task": "kv_retrieval", "tokens": 1024, "seed": 0}
    assert written["machine"]["cores"] > 0
    assert written["search"]["chunk_rows"] == 256
    loaded = load_model(str(model))
    assert written["model"]["revision"] == loaded.info.revision
    assert isinstance(pattern_for_model("minference", loaded.info), MInference)


def test_the_demo_models_file_was_made_from_its_weights() -> None:
    info = load_model(str(DEMO)).info
    pattern = pattern_for_model("minference", info)
    assert isinstance(pattern, MInference)
    assert pattern.head_choices.revision == info.revision, "run longreach search-patterns again"
    written = json.loads((DEMO / "patterns.json").read_text())
    assert {"search", "calibration", "machine", "commit", "command"} <= set(written)


def test_the_calibration_prompt_is_key_value_retrieval_of_exactly_that_length() -> None:
    encoder = load_encoder(str(DEMO))
    ids = calibration_prompt(encoder, 2000, seed=3)
    assert len(ids) == 2000
    assert "JSON" in encoder.decode(ids)
    assert ids != calibration_prompt(encoder, 2000, seed=4)


def test_the_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["search-patterns", "--help"])
    text = capsys.readouterr().out
    for word in ("2407.02490", "--prefill minference", "goes on after its last finished layer"):
        assert word in text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tokens", "100"], "--tokens is 100; it must be at least 512"),
        (["--chunk-rows", "200"], "multiple of 128"),
        (["--tolerance", "2"], "between 0 and 1"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search-patterns", "--model", "nowhere", *flags]) == 2
    assert says in capsys.readouterr().err


def test_a_model_of_the_hub_needs_a_place_for_its_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["search-patterns", "--model", "someone/model"]) == 2
    assert "name one with --output" in capsys.readouterr().err
