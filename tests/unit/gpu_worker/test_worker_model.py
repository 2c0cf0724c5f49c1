"""Loading, the conformance gate and the digest that identifies a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from worker_models import FAMILIES, random_model, random_module, saved_model

from gpu_worker.arrays import to_array, to_tensor
from gpu_worker.conformance import measure_conformance, require_conformance
from gpu_worker.methods.in_process import InProcessRetriever
from gpu_worker.model import load_model, model_revision, prepare_model
from longreach.errors import InvalidRequest, UnsupportedModel
from longreach.types import BFLOAT16

DEMO = Path(__file__).parents[3] / "models" / "demo"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_conformance_gate(family: str) -> None:
    assert require_conformance(random_model(family)).worst < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_pass_within_their_rounding(dtype: torch.dtype) -> None:
    module = random_module("qwen3").to(dtype)
    found = require_conformance(prepare_model(module, "half", torch.device("cpu")))
    assert found.worst > 1e-4


def test_rounding_to_bfloat16_is_told_from_attention_that_is_a_tenth_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model(str(DEMO), "cpu", "bfloat16")
    require_conformance(model)
    attend = InProcessRetriever._attend

    def sharper(
        self: InProcessRetriever, layer: int, asked: Any, scale: float, softcap: float
    ) -> Any:
        return attend(self, layer, asked, 1.1 * scale, softcap)

    monkeypatch.setattr(InProcessRetriever, "_attend", sharper)
    with pytest.raises(UnsupportedModel, match="differ from eager attention"):
        require_conformance(model)


def test_the_gate_refuses_a_model_whose_retrieved_keys_are_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model("llama")
    monkeypatch.setattr("gpu_worker.methods.retrieval.merge", lambda local, remote: local)
    found = measure_conformance(model)
    assert found.prefill < 1e-4
    assert found.decode > 1e-2
    with pytest.raises(UnsupportedModel, match="differ from eager attention"):
        require_conformance(model)


def test_the_gate_refuses_a_model_that_cannot_run_in_chunks() -> None:
    config = hf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = prepare_model(hf.GPT2LMHeadModel(config), "gpt2", torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match="a forward pass failed"):
        require_conformance(model)


def _bert(**changes: object) -> hf.BertLMHeadModel:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=512, pad_token_id=0, **changes,
    )  # fmt: skip
    return hf.BertLMHeadModel(config).eval()


def test_a_bidirectional_model_is_refused_by_what_its_attention_says() -> None:
    with pytest.raises(UnsupportedModel, match=r"BertSelfAttention\) is not causal"):
        prepare_model(_bert(), "bert", torch.device("cpu"))


def test_a_bidirectional_model_that_says_nothing_is_refused_by_what_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpu_worker.model.check_causal", lambda *_: None)
    model = prepare_model(_bert(), "bert", torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=r"change by .* with the tokens that follow"):
        require_conformance(model)


def test_a_saved_model_is_loaded_with_what_the_cluster_has_to_know(tmp_path: Path) -> None:
    path = saved_model("gemma2", tmp_path / "my-gemma")
    info = load_model(str(path)).info
    assert info.model == "my-gemma"
    assert info.source == str(path)
    assert info.eos_ids == (2,)
    assert info.vocab_size == 512
    assert info.max_positions == 4096
    assert info.identity.dtype == "float32"
    assert info.identity.revision == info.revision == load_model(str(path)).info.revision
    assert [layer.sliding_window for layer in info.layers] == [40, 0, 40]


def test_a_dtype_can_be_chosen(tmp_path: Path) -> None:
    path = saved_model("llama", tmp_path / "m")
    model = load_model(str(path), dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    assert model.info.identity.dtype == "bfloat16"


@pytest.mark.parametrize("source", ["", "/nowhere/at/all"])
def test_nothing_to_load_is_an_error_that_says_so(source: str) -> None:
    with pytest.raises(InvalidRequest, match="model"):
        load_model(source)


def test_an_encoder_decoder_is_refused_by_name_with_what_works(tmp_path: Path) -> None:
    hf.T5Config(num_layers=1, d_model=32).save_pretrained(tmp_path / "my-t5")
    with pytest.raises(UnsupportedModel, match=r"'my-t5'.*'t5' is not a causal language") as error:
        load_model(str(tmp_path / "my-t5"))
    assert "Llama 2, 3 and 3.1" in error.value.message
    assert "GLM-4" in error.value.message


def test_another_weight_is_another_revision() -> None:
    module = random_module("llama")
    before = model_revision(module)
    assert model_revision(random_module("llama")) == before
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert model_revision(module) != before


def test_another_configuration_is_another_revision() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5}
    revisions = {
        model_revision(random_module("llama")),
        model_revision(random_module("llama", rope_parameters=rope)),
    }
    assert len(revisions) == 2


def test_bfloat16_survives_the_way_to_numpy_and_back() -> None:
    tensor = torch.randn(3, 5).to(torch.bfloat16)
    array = to_array(tensor.T)
    assert array.dtype == BFLOAT16
    assert array.shape == (5, 3)
    assert torch.equal(to_tensor(array), tensor.T)
    array.flags.writeable = False
    assert torch.equal(to_tensor(array), tensor.T)
