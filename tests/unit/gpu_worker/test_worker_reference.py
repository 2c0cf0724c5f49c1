"""The reference program is transformers' own greedy generation, on long contexts too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_models import (
    assert_logits_equal,
    eager,
    eager_logits,
    random_model,
    random_tokens,
    saved_model,
)

from gpu_worker import reference
from gpu_worker.reference import FullAttention
from longreach.errors import InvalidRequest


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_answers_are_those_of_generate(family: str) -> None:
    model = random_model(family)
    context = random_tokens(300)
    full = FullAttention(model, context, room_tokens=64)
    for seed in (1, 2):
        question = random_tokens(9, seed=seed)
        ids = torch.tensor([[*context, *question]])

        def generate(module: Any, ids: torch.Tensor = ids) -> torch.Tensor:
            tokens: torch.Tensor = module.generate(
                ids, max_new_tokens=12, do_sample=False, eos_token_id=None
            )
            return tokens

        want = eager(model, generate)
        assert full.answer(question, 12) == want[0, -12:].tolist()


def test_feeding_token_by_token_equals_one_forward_pass() -> None:
    model = random_model("gpt-oss")
    tokens = random_tokens(130)
    full = FullAttention(model, tokens[:100], room_tokens=30)
    want = eager_logits(model, tokens)
    assert_logits_equal(full.feed(tokens[100:110]), want[109])
    for at in range(110, 130):
        assert_logits_equal(full.feed(tokens[at : at + 1]), want[at])


def test_a_stop_token_ends_an_answer() -> None:
    model = random_model("llama")
    full = FullAttention(model, random_tokens(80), room_tokens=64)
    answer = full.answer(random_tokens(5, seed=4), 12)
    assert full.answer(random_tokens(5, seed=4), 12, stop_ids=[answer[3]]) == answer[:3]


def test_too_long_an_answer_is_refused() -> None:
    full = FullAttention(random_model("llama"), random_tokens(20), room_tokens=8)
    with pytest.raises(InvalidRequest, match="room for 8"):
        full.answer(random_tokens(5), 10)


def test_the_program_prints_the_tokens_of_every_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "configure", lambda: None)
    model = saved_model("llama", tmp_path / "model")
    asked = {"context": random_tokens(70), "questions": [random_tokens(4), random_tokens(6)]}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    arguments = ["--model", str(model), "--tokens", str(tmp_path / "asked.json")]
    assert reference.main([*arguments, "--max-tokens", "5"]) == 0
    answers = json.loads(capsys.readouterr().out)["tokens"]
    assert [len(answer) for answer in answers] == [5, 5]


def test_the_program_says_what_is_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "configure", lambda: None)
    (tmp_path / "asked.json").write_text(json.dumps({"context": [1], "questions": [[9999]]}))
    model = saved_model("llama", tmp_path / "model")
    assert reference.main(["--model", str(model), "--tokens", str(tmp_path / "asked.json")]) == 2
    assert "9999" in caplog.text
