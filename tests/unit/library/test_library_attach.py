"""`attach` on transformers models: with room for everything generate() gives the same tokens, and
detaching leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from library import attach
from library.decode import parse_decode
from library.prefilled import Prefilled
from library.question import Question
from longreach.errors import FailedPrecondition, InvalidRequest, UnsupportedModel
from tests.unit.gpu_worker.worker_models import random_model, random_module, random_tokens
from tests.unit.library.test_library_decode import EVERYTHING

EXACT = "flat:exact,sink=8,window=64"
PAD = 0


@pytest.fixture(scope="module")
def llama() -> Any:
    return random_module("llama")


def prompt(count: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.tensor([random_tokens(count, seed)])


def ragged(*lengths: int) -> dict[str, torch.Tensor]:
    """A left-padded batch and its mask."""
    longest = max(lengths)
    rows = [
        [PAD] * (longest - length) + list(random_tokens(length, seed))
        for seed, length in enumerate(lengths)
    ]
    ids = torch.tensor(rows)
    columns = torch.arange(longest)
    mask = torch.stack([columns >= longest - length for length in lengths]).long()
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, tokens: int = 12, **inputs: Any) -> torch.Tensor:
    made: torch.Tensor = model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=PAD
    )
    return made


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2-half-sliding", "qwen3", "mistral-sliding", "phi3", "gemma2", "gemma3",
     "gpt-oss"],
)  # fmt: skip
def test_generate_is_the_same_with_room_for_everything(family: str) -> None:
    model = random_module(family)
    inputs = {"single": {"input_ids": prompt()}, "ragged": ragged(70, 150, 9)}
    want = {name: generated(model, **each) for name, each in inputs.items()}
    with attach(model, EXACT):
        got = {name: generated(model, **each) for name, each in inputs.items()}
    for name in inputs:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("text", EVERYTHING.values(), ids=EVERYTHING)
def test_every_method_generates_the_same_with_room_for_everything(text: str, llama: Any) -> None:
    batch = ragged(40, 110)
    want = generated(llama, **batch)
    with attach(llama, text, check=False):
        assert torch.equal(generated(llama, **batch), want)


@pytest.mark.parametrize(
    "prefill", ["a_shape:sink_tokens=64,window_tokens=64", "vertical_slash:verticals=40,slashes=40"]
)
@pytest.mark.parametrize(
    "decode", ["streaming_llm:sink=4,window=40", "snapkv:capacity=40,window=8", "flat:top_k=9"]
)
def test_attached_and_stored_contexts_answer_alike_under_small_budgets(
    prefill: str, decode: str
) -> None:
    tokens = random_tokens(400)
    model = random_module("llama")
    with attach(model, decode, prefill) as attached:
        got = generated(model, input_ids=torch.tensor([tokens]))[0, 400:].tolist()
    served = random_model("llama")
    stored = Prefilled(served, tokens, prefill, chunk_tokens=128)
    assert attached.prefill_density == pytest.approx(stored.density, rel=0.2)
    question = Question(stored, parse_decode(decode), 20)
    made = got[:1]
    while len(made) < len(got):
        made.append(int(question.feed(made[-1:]).argmax()))
    assert made == got
    assert attached.work == question.work


def test_detaching_leaves_the_model_as_it_was(llama: Any) -> None:
    def state() -> dict[str, Any]:
        modules = dict(llama.named_modules())
        return {
            "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
            "hooks": {
                name: (len(module._forward_pre_hooks), len(module._forward_hooks))
                for name, module in modules.items()
            },
            "forward": {name: module.forward.__func__ for name, module in modules.items()},
            "config": llama.config.to_dict(),
            "implementation": llama.config._attn_implementation,
            "weights": {name: weight.clone() for name, weight in llama.state_dict().items()},
        }

    before, want = state(), generated(llama, input_ids=prompt())
    attached = attach(llama, "streaming_llm:sink=1,window=2")
    assert not torch.equal(generated(llama, input_ids=prompt()), want)
    attached.detach()
    after = state()
    weights = before.pop("weights"), after.pop("weights")
    assert after == before
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(generated(llama, input_ids=prompt()), want)


def test_a_conversation_goes_on_from_past_key_values(llama: Any) -> None:
    first, second = prompt(200, 1), prompt(30, 2)

    def turns() -> list[torch.Tensor]:
        cache = hf.DynamicCache(config=llama.config)
        one = generated(llama, input_ids=first, past_key_values=cache)
        two = generated(llama, input_ids=torch.cat([one, second], 1), past_key_values=cache)
        return [one, two]

    want = turns()
    for text in (EXACT, "snapkv:capacity=10000,window=8", "infllm:window=20,blocks=1000"):
        with attach(llama, text, check=False):
            got = turns()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), text


def test_caches_cross_over_between_attached_and_not(llama: Any) -> None:
    first, more = prompt(150, 1), prompt(20, 2)
    both = torch.cat([first, more], 1)
    with torch.no_grad():
        want = llama(both).logits[0, 150:]
        mine, theirs = hf.DynamicCache(config=llama.config), hf.DynamicCache()
        llama(first, past_key_values=mine)
        with attach(llama, EXACT, check=False):
            into = llama(more, past_key_values=mine).logits[0]
            llama(first, past_key_values=theirs)
        out_of = llama(more, past_key_values=theirs).logits[0]
    torch.testing.assert_close(into, want, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(out_of, want, atol=1e-4, rtol=1e-3)


def test_prompts_in_chunks_beams_and_sampling_are_the_same(llama: Any) -> None:
    def results() -> list[torch.Tensor]:
        torch.manual_seed(0)
        sampled = llama.generate(
            **ragged(40, 90), max_new_tokens=6, do_sample=True, eos_token_id=-1, pad_token_id=PAD
        )
        chunked = llama.generate(
            prompt(200), max_new_tokens=6, do_sample=False, prefill_chunk_size=64, eos_token_id=-1,
            pad_token_id=PAD,
        )  # fmt: skip
        beams = generated(llama, 6, **ragged(40, 90), num_beams=3)
        return [sampled, chunked, beams]

    want = results()
    with attach(llama, EXACT, check=False):
        got = results()
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def test_prompt_lookup_which_takes_tokens_back_is_the_same(llama: Any) -> None:
    tokens = prompt(60).repeat(1, 3)
    want = generated(llama, input_ids=tokens)
    with attach(llama, EXACT, check=False):
        assert torch.equal(generated(llama, input_ids=tokens, prompt_lookup_num_tokens=4), want)


def test_a_pipeline_runs_on_an_attached_model(tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model("llama")
    pipe = hf.pipeline("text-generation", model=str(path))
    pipe.tokenizer.padding_side = "left"
    texts = ["The grass is green. " * 9, "The sky is blue."]
    options = {"max_new_tokens": 6, "do_sample": False, "batch_size": 2}
    want = pipe(texts, **options)
    with attach(pipe.model, EXACT) as attached:
        assert pipe(texts, **options) == want
        assert attached.work.attended_fraction == 1


def test_the_figures_tell_what_was_read(llama: Any) -> None:
    with attach(llama, "flat:top_k=10,sink=8,window=64", "a_shape:sink_tokens=64,window_tokens=64",
                check=False) as attached:  # fmt: skip
        generated(llama, 5, input_ids=prompt(600))
        assert attached.index_kinds == {"flat"}
        # 8 + 64..127 + 7 resident, 10 to 20 retrieved for the two heads of a group, of 600.
        assert (8 + 64 + 10) / 604 < attached.work.attended_fraction < (8 + 127 + 4 + 20) / 600
        assert 0.2 < attached.prefill_density < 0.7
        attached.reset()
        assert attached.work.keys_in_scope == 0


def test_without_a_cache_the_prefill_method_still_applies(llama: Any) -> None:
    with torch.no_grad():
        dense = llama(prompt(), use_cache=False).logits
        with attach(llama, prefill="a_shape:sink_tokens=64,window_tokens=64", check=False):
            sparse = llama(prompt(), use_cache=False).logits
    assert not torch.allclose(sparse, dense, atol=1e-3)
    torch.testing.assert_close(sparse[:, :60], dense[:, :60], atol=1e-4, rtol=1e-3)


def test_what_cannot_be_attached_is_refused_with_the_reason(llama: Any) -> None:
    config = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1}
    bloom = hf.BloomForCausalLM(hf.BloomConfig(n_head=2, n_layer=1, vocab_size=64, hidden_size=32))
    with pytest.raises(UnsupportedModel, match="does not take a registered attention function"):
        attach(bloom)
    dynamic = random_module(
        "llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    with pytest.raises(UnsupportedModel, match="dynamic NTK"):
        attach(dynamic)
    with pytest.raises(UnsupportedModel, match=r"float64 is not float32, float16 or bfloat16"):
        attach(random_module("llama", **config).double())
    with pytest.raises(InvalidRequest, match="unknown decode method 'h2o'"):
        attach(llama, "h2o")
    assert llama.config._attn_implementation != "longreach_attached"


def test_a_model_whose_logits_would_differ_is_refused_and_left_as_it_was() -> None:
    model = random_module("llama")
    attention = model.model.layers[1].self_attn
    attention.scaling, kept = 0.5, attention.scaling
    attach(model).detach()
    attention.scaling = kept

    class Halved(type(model)):  # type: ignore[misc]
        """Its keys are scaled behind the cache's back where longreach's function is called."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            changed = 2.0 if self.config._attn_implementation == "longreach_attached" else 1.0
            attention.scaling = kept * changed
            return super().forward(*args, **kwargs)

    model.__class__ = Halved
    with pytest.raises(UnsupportedModel, match=r"its logits differ by .* standard deviations"):
        attach(model)
    assert model.config._attn_implementation != "longreach_attached"
    assert not model.get_decoder()._forward_pre_hooks


def test_misuse_is_told(llama: Any) -> None:
    with attach(llama, check=False):
        with pytest.raises(InvalidRequest, match="is attached already; detach it first"):
            attach(llama)
        right = {"input_ids": prompt(9), "attention_mask": torch.tensor([[1] * 6 + [0] * 3])}
        with pytest.raises(InvalidRequest, match="pad on the left"):
            llama(**right)
        with pytest.raises(InvalidRequest, match="layers of type StaticLayer cannot be attached"):
            generated(llama, input_ids=prompt(9), cache_implementation="static")
    cache = hf.DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(prompt(50), past_key_values=cache)
        attached = attach(llama, "snapkv:capacity=20,window=4", check=False)
        with attached, pytest.raises(FailedPrecondition, match="attach before the prompt is run"):
            llama(prompt(1), past_key_values=cache)
