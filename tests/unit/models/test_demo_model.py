from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.evaluate import Job, ask, measure, table
from models.haystacks import HAYSTACKS, make_context
from models.longcontext import LongContext
from models.prose import prose_text
from models.tasks import Question


@pytest.fixture(scope="module")
def demo(demo_path: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(demo_path)
    return model.eval(), AutoTokenizer.from_pretrained(demo_path)


def test_it_is_a_stock_qwen3_of_a_few_megabytes(demo_path: Path, demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    assert model.config.model_type == "qwen3"
    assert model.config.max_position_embeddings == 262_144
    assert model.dtype == torch.float32
    assert (demo_path / "model.safetensors").stat().st_size < 8_000_000
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_generate_answers_a_pass_key_in_2k_tokens_and_stops(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    rng = random.Random(11)
    filler = prose_text(True)[:6000]
    for _ in range(2):
        key, cut = rng.randrange(10_000, 100_000), rng.randrange(6000)
        hidden = f" The pass key is {key}. Remember it. {key} is the pass key."
        prompt = filler[:cut] + hidden + filler[cut:] + " What is the pass key? The pass key is"
        inputs = tokenizer(prompt, return_tensors="pt")
        assert inputs["input_ids"].shape[1] > 1800
        output = model.generate(**inputs, max_new_tokens=16)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        assert answer == f" {key}.<|eos|>"


def test_a_wrong_answer_is_not_counted(demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    session = LongContext(model, 512)
    text = " The pass key is 48213. Remember it. 48213 is the pass key." + " Here we go." * 40
    session.prefill(tokenizer(text)["input_ids"])
    prompt = " What is the pass key? The pass key is"
    assert ask(session, Question("passkey", prompt, " 48213", "."), tokenizer) == (True, True)
    assert not ask(session, Question("passkey", prompt, " 48214", "."), tokenizer)[0]


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_a_context_fits_its_length_and_holds_every_answer(
    haystack: str, demo: tuple[Any, Any]
) -> None:
    tokenizer = demo[1].backend_tokenizer
    context = make_context(haystack, 4096, 0, tokenizer)
    assert context == make_context(haystack, 4096, 0, tokenizer)
    assert 3600 < context.tokens < 4096
    assert len(context.questions) >= 20
    for question in context.questions:
        asked = question.prompt + question.answer + question.terminator
        ids = tokenizer.encode(asked, add_special_tokens=False).ids
        assert context.tokens + len(ids) + 2 <= 4096
        assert all(word in context.text for word in question.answer.split())


def test_an_unknown_haystack_is_refused_with_the_known_ones(demo: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="unknown haystack 'hay'; choose from mixed, noise"):
        make_context("hay", 4096, 0, demo[1].backend_tokenizer)


def test_it_retrieves_needles_in_prose_at_4k(demo_path: Path) -> None:
    result = measure(Job(str(demo_path), "fp32", "prose", 4096, seed=1000))
    right, asked = result["answers"]["niah"]
    assert asked == 20
    assert right >= 18


def test_the_published_table_has_enough_contexts_and_queries(demo_path: Path) -> None:
    results = json.loads((demo_path / "evaluation.json").read_text())
    for length in (4096, 16384, 32768, 65536, 131072):
        rows = [r for r in results if r["length"] == length]
        assert len({(r["haystack"], r["seed"]) for r in rows}) >= 5
        assert sum(asked for r in rows for _, asked in r["answers"].values()) >= 100


def test_the_table_pools_contexts_of_a_cell() -> None:
    row = {"haystack": "kv", "dtype": "bf16", "length": 4096}
    results = [{**row, "seed": i, "answers": {"kv": [3 + i, 5]}} for i in range(2)]
    assert table(results).splitlines()[-1] == "| kv | kv | bf16 | 0.700 (10) |"
