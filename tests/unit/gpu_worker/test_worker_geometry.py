"""What a configuration tells: the shape of the layers, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf

from gpu_worker.geometry import (
    check_supported,
    layer_geometries,
    max_positions,
    rope_regime,
)
from longreach.errors import UnsupportedModel

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 128,
}


def test_alternating_layers_have_their_own_windows() -> None:
    layers = layer_geometries(hf.Gemma2Config(**SIZES, head_dim=32, sliding_window=40))
    assert [layer.sliding_window for layer in layers] == [40, 0, 40, 0]
    assert {(x.q_heads, x.kv_heads, x.head_dim, x.value_dim) for x in layers} == {(4, 2, 32, 32)}
    assert [layer.layer for layer in layers] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (hf.MistralConfig(**SIZES, sliding_window=None), {0}),
        (hf.MistralConfig(**SIZES, sliding_window=30), {30}),
        (hf.Phi3Config(**SIZES, sliding_window=None), {0}),
        (hf.LlamaConfig(**SIZES), {0}),
        (hf.GPTNeoXConfig(vocab_size=64, hidden_size=64, num_attention_heads=4), {0}),
    ],
)
def test_layers_without_types_share_the_models_window(config: Any, windows: set[int]) -> None:
    assert {layer.sliding_window for layer in layer_geometries(config)} == windows


def test_long_rope_is_served_up_to_its_original_length() -> None:
    config = hf.Phi3Config(
        **SIZES,
        sliding_window=None,
        original_max_position_embeddings=128,
        rope_parameters=LONGROPE,
        pad_token_id=0,
    )
    check_supported(hf.Phi3ForCausalLM, config, "phi")
    assert max_positions(config) == 128
    assert rope_regime(config) == "longrope-short"


def test_the_rope_regime_names_the_scaling() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    assert rope_regime(hf.LlamaConfig(**SIZES)) == "default"
    assert rope_regime(hf.LlamaConfig(**SIZES, rope_parameters=yarn)) == "yarn"
    assert max_positions(hf.LlamaConfig(**SIZES)) == 4096


REFUSED = [
    (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        ),
        "dynamic NTK",
    ),
    (
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(**{**SIZES, "num_key_value_heads": 4}),
        "latent",
    ),
    (
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig(**SIZES, attention_chunk_size=64),
        "chunked attention",
    ),
    (hf.BloomForCausalLM, hf.BloomConfig(n_layer=1), "registered attention"),
    (hf.MambaForCausalLM, hf.MambaConfig(num_hidden_layers=1), "registered attention"),
    (
        hf.Gemma3nForCausalLM,
        hf.Gemma3nTextConfig(**{**SIZES, "num_hidden_layers": 10}, num_kv_shared_layers=5),
        "another layer",
    ),
    (
        hf.MiniMaxForCausalLM,
        hf.MiniMaxConfig(**SIZES, layer_types=["linear_attention", "full_attention"] * 2),
        "linear_attention",
    ),
]


@pytest.mark.parametrize(("model_class", "config", "reason"), REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(
    model_class: type, config: Any, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        check_supported(model_class, config, "some-model")
    assert "some-model" in refusal.value.message
    assert "Qwen3" in refusal.value.message
