"""Any prefill method with any decode method over one stored context, against full attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_worker.chunking import FixedChunks
from gpu_worker.model import Model, load_model
from gpu_worker.patterns.spec import pattern_for_model
from gpu_worker.prefill import PrefillJob
from gpu_worker.reference import FullAttention
from library.decode import DecodeMethod, parse_decode
from library.prefilled import Prefilled
from library.question import PROMPT_RULES, PromptRule, Question
from longreach.errors import InvalidRequest
from tests.unit.gpu_worker.worker_models import random_model, random_tokens
from tests.unit.library.test_library_decode import EVERYTHING

CONTEXT = random_tokens(420, seed=1)
QUESTIONS = (random_tokens(9, seed=2), random_tokens(40, seed=3))
PREFILLS = (
    "dense",
    "a_shape:sink_tokens=64,window_tokens=64",
    "vertical_slash:verticals=40,slashes=40",
    "block_sparse:top_blocks=1",
    "adaptive:dense_below=0,dense_first_rows=0",
)
ROOM = 60

Models = Callable[[str], Model]


@pytest.fixture(scope="module")
def models() -> Models:
    made: dict[str, Model] = {}

    def get(family: str) -> Model:
        if family not in made:
            made[family] = random_model(family)
        return made[family]

    return get


@pytest.fixture(scope="module")
def stored(models: Models) -> Prefilled:
    return Prefilled(models("llama"), CONTEXT, every_query=True, chunk_tokens=128)


def answers(
    stored: Prefilled, method: DecodeMethod, rule: PromptRule = "stored"
) -> list[list[int]]:
    return [Question(stored, method, ROOM, rule).answer(asked, 10) for asked in QUESTIONS]


def full_answers(model: Model, prefill: str = "dense") -> list[list[int]]:
    full = FullAttention(model, (), len(CONTEXT) + ROOM)
    pattern = None if prefill == "dense" else pattern_for_model(prefill, model.info)
    job = PrefillJob(CONTEXT, model.layers, full, FixedChunks(2048), pattern=pattern)
    job.run(model.module, model.device)
    full.length = full._context = len(CONTEXT)
    return [full.answer(asked, 10) for asked in QUESTIONS]


@pytest.mark.parametrize("rule", PROMPT_RULES)
@pytest.mark.parametrize("text", EVERYTHING.values(), ids=EVERYTHING)
def test_methods_with_room_for_everything_answer_as_full_attention(
    text: str, rule: PromptRule, stored: Prefilled
) -> None:
    method = parse_decode(text)
    assert answers(stored, method, rule) == full_answers(stored.model)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt-oss", "phi3", "qwen2-half-sliding"])
@pytest.mark.parametrize("text", ["full", "flat:exact,sink=8,window=64", "quest:budget=10000"])
def test_sliding_windows_softcaps_and_sinks_are_kept(
    family: str, text: str, models: Models
) -> None:
    prefilled = Prefilled(models(family), CONTEXT, chunk_tokens=128)
    assert answers(prefilled, parse_decode(text)) == full_answers(models(family))


@pytest.mark.parametrize("prefill", PREFILLS)
def test_any_prefill_goes_with_any_decode(prefill: str, models: Models) -> None:
    model = models("llama")
    prefilled = Prefilled(model, CONTEXT, prefill, every_query=True)
    assert 0 < prefilled.density <= 1
    assert prefilled.density < 1 or prefill == "dense" or prefill.startswith("adaptive")
    want = full_answers(model, prefill)
    for name in ("full", "strided", "snapkv", "quest", "infllm", "flat"):
        assert answers(prefilled, parse_decode(EVERYTHING[name])) == want, name


def test_small_budgets_differ_and_leave_the_stored_context_as_it_was(stored: Prefilled) -> None:
    want = full_answers(stored.model)
    small = parse_decode("streaming_llm:sink=1,window=4")
    assert answers(stored, small) != want
    assert answers(stored, parse_decode("full")) == want


def test_a_question_in_the_prompt_is_no_work_of_the_method(
    stored: Prefilled,
) -> None:
    method = parse_decode("streaming_llm:sink=8,window=32")
    through, whole = (Question(stored, method, ROOM, rule) for rule in PROMPT_RULES)
    asked, made = QUESTIONS[0], 5
    for each in (through, whole):
        each.answer(asked, made)
    pairs = sum(layer.kv_heads for layer in stored.model.layers)
    fed = [len(CONTEXT) + len(asked) + step for step in range(made - 1)]
    assert whole.work.keys_in_scope == pairs * sum(fed)
    assert whole.work.keys_attended == pairs * 40 * (made - 1)
    assert through.work.keys_in_scope == pairs * (sum(fed) + len(asked) * len(CONTEXT))


def test_an_empty_context_is_answered(models: Models) -> None:
    model = models("llama")
    prefilled = Prefilled(model, (), every_query=True)
    full = FullAttention(model, (), ROOM)
    for text in EVERYTHING.values():
        got = Question(prefilled, parse_decode(text), ROOM).answer(QUESTIONS[1], 6)
        assert got == full.answer(QUESTIONS[1], 6)


def test_what_does_not_fit_is_refused(stored: Prefilled) -> None:
    question = Question(stored, parse_decode("full"), 10)
    with pytest.raises(InvalidRequest, match="need 40 tokens; there is room for 10"):
        question.ask(QUESTIONS[1])
    thin = Prefilled(stored.model, CONTEXT[:64])
    with pytest.raises(InvalidRequest, match="infllm needs every query"):
        Question(thin, parse_decode("infllm"), ROOM)


def test_a_strong_model_in_bfloat16_keeps_its_answers_under_retrieval(
    tiny_model: Callable[[str], Path],
) -> None:
    model = load_model(str(tiny_model("qwen3")), dtype="bfloat16")
    prefilled = Prefilled(model, CONTEXT[:300])
    exact = Question(prefilled, parse_decode("sketch:exact,sink=8,window=64"), ROOM)
    full = FullAttention(model, CONTEXT[:300], ROOM)
    want, got = full.feed(QUESTIONS[0]), exact.ask(QUESTIONS[0])
    assert float((got - want).abs().max() / want.float().std()) < 0.05
