"""The two answerers on a tiny random model, and the command line over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluation.__main__ import main
from evaluation.answering import FullAnswerer
from evaluation.encoding import load_encoder
from evaluation.fingerprint import model_fingerprint
from evaluation.methods import Deployment, open_answerers, parse_methods
from evaluation.tasks import TASKS, Spec
from longreach.errors import InvalidRequest

TinyModel = Callable[[str], Path]


def quiet(_: str) -> None:
    """Nobody watches."""


def test_full_attention_answers_as_transformers_generate_does(tiny_model: TinyModel) -> None:
    path = tiny_model("qwen3")
    encoder = load_encoder(str(path))
    answerer = FullAnswerer.load(str(path))
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    samples = TASKS["mixed_noise"].samples(Spec(12_000, 0, 0, encoder))[::12]
    context = samples[0].context_ids[:700]
    handle = answerer.prefill(context, 400, quiet)
    for sample in samples:
        ids = torch.tensor([[*context, *sample.question_ids]])
        with torch.inference_mode():
            made = model.generate(ids, max_new_tokens=8, do_sample=False)[
                0, ids.shape[1] :
            ].tolist()
        wanted = made[: made.index(257)] if 257 in made else made
        assert list(answerer.answer(handle, sample.question_ids, 8).ids) == wanted
    answerer.release(handle)


def test_more_positions_than_the_model_has_are_refused(tiny_model: TinyModel) -> None:
    answerer = FullAnswerer.load(str(tiny_model("llama")))
    with pytest.raises(InvalidRequest, match=r"takes 16400 positions; .* accepts 16384"):
        answerer.prefill([1] * 16_000, 400, quiet)


@pytest.mark.cluster
def test_a_cluster_with_an_exact_budget_answers_as_full_attention(tiny_model: TinyModel) -> None:
    path = tiny_model("llama")
    encoder = load_encoder(str(path))
    (sample,) = TASKS["passkey"].samples(Spec(2000, 5, 0, encoder))
    full = FullAnswerer.load(str(path))
    handle = full.prefill(sample.context_ids, 400, quiet)
    wanted = full.answer(handle, sample.question_ids, 12)
    methods = parse_methods(["cluster/flat:exact,cluster/flat:top_k=3"])
    with open_answerers(methods, Deployment(str(path), nodes=1)) as answerers:
        exact, few = (answerers[method] for method in methods)
        stored, found = (a.prefill(sample.context_ids, 400, quiet) for a in (exact, few))
        assert (stored.found, found.found) == (False, True)
        answer = exact.answer(stored, sample.question_ids, 12)
        assert answer.ids == wanted.ids
        assert answer.work is not None
        assert answer.work.attended_fraction == 1
        assert answer.index_kinds == ("flat",)
        assert 0 < answer.resident_share < 1
        less = few.answer(found, sample.question_ids, 12)
        assert less.work is not None
        assert less.work.attended_fraction < 0.05
        few.release(found)
        assert exact.answer(stored, sample.question_ids, 12).ids == wanted.ids
        exact.release(stored)


def test_the_command_line_writes_all_files_and_goes_on_where_it_was(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    def evaluate(*more: str) -> dict[str, object]:
        path = tmp_path / "out" / "run.json"
        flags = ["--model", str(tiny_model("llama")), "--tasks", "passkey", "number_string"]
        assert main([*flags, "--methods", "full", "--n", "1", "--json", str(path), *more]) == 0
        found: dict[str, object] = json.loads(path.read_text())
        return found

    report = evaluate("--lengths", "1K")
    config, results = report["config"], report["results"]
    assert isinstance(config, dict)
    assert isinstance(results, list)
    assert config["methods"] == ["full"]
    assert config["greedy"] is True
    assert "CPython" in config["essay"]
    assert {(row["task"], row["length"], row["n"]) for row in results} == {
        ("passkey", 1024, 1),
        ("number_string", 1024, 1),
    }
    lines = (tmp_path / "out" / "run.jsonl").read_text().splitlines()
    longer = evaluate("--lengths", "1024", "1500")
    assert (tmp_path / "out" / "run.jsonl").read_text().splitlines()[:3] == lines
    assert len(longer["results"]) == 4  # type: ignore[arg-type]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("run.json", "run.jsonl", "run.md", "run.infinitebench.png"),
    }


def test_wrong_words_end_with_a_message(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_model("llama")), "--json", str(tmp_path / "run.json")]
    assert main([*flags, "--tasks", "haystack"]) == 2
    assert main([*flags, "--tasks", "qa_1", "--methods", "full", "--lengths", "4K"]) == 2
    with pytest.raises(SystemExit):
        main([*flags, "--lengths", "4M"])
    assert "'4M' is not a length; write 4096 or 4K" in capsys.readouterr().err


def test_the_help_names_every_task_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in (*TASKS, "cluster/INDEX:BUDGET", "hnsw", "flat", "--quick"):
        assert name in text


def test_training_changes_a_models_fingerprint(tiny_model: TinyModel, tmp_path: Path) -> None:
    before = model_fingerprint(str(tiny_model("llama")))
    assert before == model_fingerprint(str(tiny_model("llama")))
    copy = tmp_path / tiny_model("llama").name
    copy.mkdir()
    for path in tiny_model("llama").iterdir():
        copy.joinpath(path.name).write_bytes(path.read_bytes())
    assert model_fingerprint(str(copy)) == before
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert model_fingerprint(str(copy)) != before
    assert model_fingerprint("some/hub-name") == "some/hub-name"
