"""Tiny random models of every supported family, and eager attention as their reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

from gpu_worker.attention import ATTENTION_NAME
from gpu_worker.model import Model, prepare_model

# The models are so small that threads cost more than they give.
torch.set_num_threads(1)

VOCAB = 512
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 64.0,
    "original_max_position_embeddings": 64,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
_SLIDING = {"sliding_window": 40, "head_dim": 16}
_ALTERNATING = {
    **_SLIDING,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-linear-rope": ("Llama", {"rope_parameters": _LINEAR_ROPE}),
    "llama-yarn-rope": ("Llama", {"rope_parameters": _YARN_ROPE}),
    "qwen2": ("Qwen2", {}),
    "qwen2-half-sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-yarn-rope": ("Qwen3", {"head_dim": 32, "rope_parameters": _YARN_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-sliding": ("Mistral", _SLIDING),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-sliding": ("Phi3", {"sliding_window": 40}),
    # Half of every head is rotated, and neighbouring numbers form the pairs.
    "glm4": ("Glm4", {"head_dim": 16}),
    "gemma2": ("Gemma2", {**_SLIDING, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3", {**_SLIDING, "query_pre_attn_scalar": 24, "num_hidden_layers": 6}),
    "gemma3-linear-rope": (
        "Gemma3",
        {
            **_SLIDING,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {**_LINEAR_ROPE, "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    # Layers without position: every second one of SmolLM3, the full-attention ones of Cohere 2.
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "cohere2": ("Cohere2", _ALTERNATING),
    "gpt-oss": ("GptOss", {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
FAMILIES = tuple(_FAMILIES)


def random_module(family: str, seed: int = 1, **changes: Any) -> Any:
    """A transformers model with weights large enough that attention matters."""
    name, settings = _FAMILIES[family]
    config_class = getattr(hf, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    module = getattr(hf, f"{name}ForCausalLM")(config_class(**{**_SIZES, **settings, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.08, generator=generator)
    return module.eval()


def random_model(family: str, seed: int = 1, **changes: Any) -> Model:
    """The same, ready to serve."""
    module = random_module(family, seed, **changes)
    return prepare_model(module, family, torch.device("cpu"))


def saved_model(family: str, directory: Path) -> Path:
    """The same, in a directory as users have models."""
    random_module(family).save_pretrained(directory)
    return directory


def random_tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(3, VOCAB, count))


def eager(model: Model, work: Callable[[Any], Any]) -> Any:
    """Runs work(module) under the model's own eager attention."""
    model.module.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return work(model.module)
    finally:
        model.module.set_attn_implementation(ATTENTION_NAME)


def eager_logits(model: Model, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, vocab] of one forward pass without any cache."""
    ids = torch.tensor([list(tokens)])
    return eager(model, lambda module: module(input_ids=ids, use_cache=False).logits[0])


def assert_logits_equal(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to fp32 rounding, in standard deviations of the reference."""
    error = float((got - want).abs().max() / want.std())
    assert error < tolerance, f"logits differ by {error:.2e} standard deviations"
