"""The answerers on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluation.encoding import load_encoder
from evaluation.fingerprint import model_fingerprint
from evaluation.local import FullAnswerer
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
